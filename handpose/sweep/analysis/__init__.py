"""What the files of a sweep tell: records for its reports, the importance of parameters, its status."""
