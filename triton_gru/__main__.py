"""`python -m triton_gru check`: see `check_command`."""

from triton_gru.check_command import main

if __name__ == "__main__":
    raise SystemExit(main())
