"""switokd's services, installed as `switokd.services`."""
