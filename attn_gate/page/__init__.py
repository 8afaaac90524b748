"""What the reports of `demo` and `bench` share: a self-contained page, and figures for light and dark."""
