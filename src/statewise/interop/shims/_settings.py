"""What `install_shims` was told and modules below look up when they need it."""

allow_pickle = False
