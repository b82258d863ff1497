"""Wire types generated from proto/switokd/v1; do not edit."""
