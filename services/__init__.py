"""Services of switokd; installed as `switokd.services`."""
