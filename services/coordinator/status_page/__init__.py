"""The status page: what runs do, in a browser, on the coordinator's HTTP port."""
