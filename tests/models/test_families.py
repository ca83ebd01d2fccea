"""One model of every timm family as the encoder of a small network: a step of training, or a true refusal."""

import hydra
import pytest
import timm
import torch
from timm.layers import resample_abs_pos_embed
from timm.optim import param_groups_weight_decay

from handpose.config import compose, to_plain_values
from handpose.errors import UserError
from handpose.models.encoder import Encoder
from handpose.models.pose_net import PoseNet
from handpose.training.module import make_parameter_groups

FAST = ["test_byobnet", "test_convnext", "test_mambaout", "test_vit", "levit_128s", "pit_ti_224", "test_coatnet"]
SLOW = """
    beit_base_patch16_224 halonet_h1 cait_xxs24_224 coat_tiny convit_tiny convmixer_768_32 cpubone_nano
    crossvit_tiny_240 csatv2 cs3darknet_focus_s cspnext_tiny davit_tiny deepseek_vit_412m deit_tiny_patch16_224
    densenet121 dla46x_c dpn48b edgenext_xx_small efficientformer_l1 efficientformerv2_s0 test_efficientnet
    efficientvim_m1 efficientvit_b0 efficientvit_m0 vit_tiny_patch16_dinov3_qkvb fasternet_t0 fastvit_t8
    focalnet_tiny_srf gcvit_xxtiny gemma4_vit_167m ghostnet_050 hardcorenas_b hgnetv2_b0 hiera_tiny_224
    sam2_hiera_tiny hrnet_w18_small iformer_t inception_next_atto inception_resnet_v2 inception_v3 inception_v4
    lcnetv2_small lowformer_b0 poolformerv2_s12 gmlp_ti16_224 mobilenetv3_small_050 mobilenetv5_base mobilevit_xxs
    mvitv2_tiny naflexvit_base_patch16_parfac_gap nasnetalarge nest_tiny nextvit_small test_nfnet pnasnet5large
    pvt_v2_b0 qwen3_vit_88m rdnet_tiny regnetx_002 repghostnet_050 repvit_m1 res2next50 resnest14d test_resnet
    resnetv2_18 rexnet_100 selecsls42 legacy_seresnet18 sequencer2d_s shvit_s1 skresnet18 starnet_s050
    swiftformer_xs swin_tiny_patch4_window7_224 swinv2_tiny_window16_256 swinv2_cr_tiny_224 tiny_vit_5m_224
    tnt_s_legacy_patch16_224 tresnet_m twins_svt_small vgg11 visformer_tiny vit_tiny_r_s16_p8_224 test_vit_relpos
    samvit_base_patch16_224 vitamin_small_224 volo_d1_224 ese_vovnet19b_slim_dw legacy_xception xception41p
    xcit_nano_12_p8_224
""".split()  # noqa: SIM905
OTHER_SIZE = {"crossvit_tiny_240": 240, "efficientformer_l1": 224, "halonet_h1": 256}
"""Models that take no pictures of 64 px, with a size that they take."""
REFUSED = ["inception_resnet_v2", "inception_v3", "inception_v4"]
"""Models whose convolutions without padding leave maps that do not cover the picture."""


def make_encoder(name, image_size=64, *, weights=None, normalize=True):
    return Encoder(
        name=name, pretrained=False, weights=weights, normalize=normalize, drop_path=0.0, image_size=image_size
    )


def train_step(name, size):
    torch.manual_seed(0)
    decoder = to_plain_values(compose("train", []))["model"]["decoder"] | {"depth": 1, "width": 8, "depth_hidden": 8}
    net = PoseNet(encoder=make_encoder(name, size), decoder=hydra.utils.instantiate(decoder)).train()
    optimizer = torch.optim.SGD(make_parameter_groups(net), lr=1e-3)
    image = torch.rand(2, 3, size, size).contiguous(memory_format=torch.channels_last)
    logits = net(image)
    assert all(axis.isfinite().all() for axis in logits)
    torch.stack([axis.square().mean() for axis in logits]).sum().backward()
    optimizer.step()
    assert all(parameter.isfinite().all() for parameter in net.parameters())
    maps = net.eval().encoder(image)
    assert [each.shape[1] for each in maps] == net.encoder.channels
    cells = [each.shape[-1] * reduction for each, reduction in zip(maps, net.encoder.reductions, strict=True)]
    limits = [(size - reduction / 2, size + reduction) for reduction in net.encoder.reductions]
    assert all(low < cell < high for cell, (low, high) in zip(cells, limits, strict=True))


@pytest.mark.parametrize("name", FAST)
def test_some_families_train(name):
    train_step(name, 64)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in SLOW if name not in REFUSED])
def test_every_family_trains_or_names_a_size_that_it_takes(name):
    if name in OTHER_SIZE:
        with pytest.raises(
            UserError, match=rf"{name} does not take pictures of 64 px; give data.image_size={OTHER_SIZE[name]}$"
        ):
            make_encoder(name)
    train_step(name, OTHER_SIZE.get(name, 64))


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("image_size", [64, None])
def test_a_model_whose_maps_do_not_tile_the_picture_is_refused(name, image_size):
    with pytest.raises(UserError, match=rf"{name} cannot serve as an encoder: its last feature map .* do not cover"):
        make_encoder(name, image_size)


def test_every_family_of_timm_is_tested():
    tested = {*FAST, *SLOW}
    assert [family for family in timm.list_modules() if not tested & set(timm.list_models(module=family))] == []


def test_maps_with_channels_last_are_those_of_timm():
    module = make_encoder("test_mambaout", normalize=False).eval()
    image = torch.rand(1, 3, 64, 64)
    expected = [features.permute(0, 3, 1, 2) for features in module.pyramid(image)]
    assert all(torch.equal(a, b) for a, b in zip(module(image), expected, strict=True))
    assert [features.shape[1] for features in expected] == module.channels


@pytest.mark.parametrize(("image_size", "side"), [(64, 64), (100, 112), (None, 160)])
def test_a_model_of_one_size_is_built_for_the_pictures_and_sees_others_resized(image_size, side):
    module = make_encoder("test_vit", image_size).eval()
    assert module.pyramid.model.pos_embed.shape[1] == 1 + (side // 16) ** 2
    image = torch.rand(1, 3, 72, 72)
    resized = torch.nn.functional.interpolate(image, size=(side, side), mode="bilinear", align_corners=False)
    assert module(image)[-1].shape[-2:] == (side // 16, side // 16)
    assert torch.equal(module(image)[-1], module(resized)[-1])


def test_weights_of_another_size_are_resampled_as_timm_does(tmp_path):
    source = timm.create_model("test_vit", pretrained=False)  # for 160 px
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    model = make_encoder("test_vit", weights=str(tmp_path / "weights.pth")).pyramid.model
    expected = resample_abs_pos_embed(source.pos_embed, new_size=[4, 4], num_prefix_tokens=1)
    assert torch.allclose(model.pos_embed, expected)
    assert torch.equal(model.blocks[0].mlp.fc1.weight, source.blocks[0].mlp.fc1.weight)


def test_looking_at_a_model_draws_no_random_numbers():
    values = []
    for size in (48, 48):  # the first is looked at, the second remembered
        torch.manual_seed(0)
        values.append(make_encoder("test_convnext", size).pyramid.stem_0.weight)
    assert torch.equal(*values)


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("test_vit", "pos_embed"),
        ("test_vit", "cls_token"),
        ("levit_128s", "attention_biases"),
        ("test_coatnet", "relative_position_bias_table"),
    ],
)
def test_what_a_model_names_does_not_decay(name, part):
    net = torch.nn.ModuleDict({"encoder": make_encoder(name)})
    undecayed = {
        id(each) for group in make_parameter_groups(net) if "weight_decay" in group for each in group["params"]
    }
    named = {key: id(each) in undecayed for key, each in net.named_parameters() if key.endswith(part)}
    assert named
    assert all(named.values())


@pytest.mark.parametrize("name", ["test_vit", "levit_128s", "test_coatnet", "test_convnext"])
def test_just_those_parameters_do_not_decay_that_timm_itself_excludes(name):
    """Counted by timm's own groups of the whole model, whose classifier and last norm an encoder does not have."""
    net = torch.nn.ModuleDict({"encoder": make_encoder(name)})
    decayed = sum(len(group["params"]) for group in make_parameter_groups(net) if "weight_decay" not in group)
    model = timm.create_model(name, pretrained=False, num_classes=0)
    theirs = param_groups_weight_decay(model, no_weight_decay_list=_named(model))
    assert decayed == len(theirs[1]["params"])


def _named(model):
    return model.no_weight_decay() if hasattr(model, "no_weight_decay") else ()
