"""3-D hand pose networks and their hyper-parameter search."""
