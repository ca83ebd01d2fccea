"""URLs, and the secrets in them."""

import pytest

from handpose.urls import hide_secrets


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql://me:hunter2@db/x", "postgresql://me:***@db/x"),
        ("postgresql://me:hun/ter2@db/x", "postgresql://me:***@db/x"),
        ("abfs://:hunter2@account/x", "abfs://:***@account/x"),
        ("mysql://db/x?user=me&passwd=hunter2", "mysql://db/x?user=me&passwd=***"),
        ("mysql://db/x?PWD=hunter2&charset=utf8", "mysql://db/x?PWD=***&charset=utf8"),
        ("postgresql://db/x?sslpassword=hunter2", "postgresql://db/x?sslpassword=***"),
        ("postgresql://db/x?%70assword=hunter2", "postgresql://db/x?%70assword=***"),
        ("mysql://db/x?ssl_key_password=hunter2", "mysql://db/x?ssl_key_password=***"),
        ("s3://b/x?region=eu&secret_key=hunter2", "s3://b/x?region=eu&secret_key=***"),
        ("s3://b/x?session_token=hunter2", "s3://b/x?session_token=***"),
        ("https://b/x?X-Amz-Signature=hunter2&sig=hunter2", "https://b/x?X-Amz-Signature=***&sig=***"),
    ],
)
def test_a_secret_in_a_url_is_hidden(url, shown):
    assert hide_secrets(url) == shown
    assert hide_secrets(f"cannot open {url} now") == f"cannot open {shown} now"


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://me@db/x",
        "postgresql://db/x?sslkey=/home/me/client.key&sslmode=verify-full&sslcert=/home/me/client.crt",
        "mysql://db/x?ssl_key=/home/me/client.key&ssl_ca=/ca.pem",
        "postgresql://db/x?passfile=/home/me/.pgpass",
        "s3://bucket/monkey/folder?region=eu-west-1&endpoint_override=http://127.0.0.1:9000",
        "sqlite:////folder/study.db",
        "${oc.env:STUDY_URL}",
    ],
)
def test_a_url_without_secrets_stays_as_it_is(url):
    assert hide_secrets(url) == url
