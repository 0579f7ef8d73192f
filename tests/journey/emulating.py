"""Serve the emulator with the options of the journey: `python emulating.py PORT`."""

import sys

import uvicorn

from receiver.emulator import Options, create_emulator

OPTIONS = Options(
    generation=0.5,
    shape="mixed",
    keep_alive=1,
    stray_events=0.3,
    time_scale=0.05,
    eachlabs_in_flight=None,
    eachlabs_per_minute=None,
    seed=11,
)

if __name__ == "__main__":
    uvicorn.run(create_emulator(OPTIONS), port=int(sys.argv[1]), log_level="warning", ws="none")
