"""Emulators of clouds, for laptops, tests and benchmarks: `dispatcher emulate`.

Each is a package of its own that needs the extra of its cloud; nothing here is imported unless an
emulator is started.
"""
