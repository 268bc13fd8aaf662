"""`make pretrain`: the weights of the embedded model, from nothing."""

import argparse
from pathlib import Path

from torch.multiprocessing.spawn import start_processes

from perception_r1.embedded.model import BASE, build_model_folder
from perception_r1.embedded.pretraining.questions import corpus
from perception_r1.embedded.pretraining.training import Settings, run_process
from perception_r1.locks import locked


def main() -> None:
    """Read the command line; start the processes."""
    parser = argparse.ArgumentParser(prog="python -m perception_r1.embedded.pretraining", description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("logs/pretraining"), help="where the state is kept")
    parser.add_argument("--processes", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--save_every", type=int, default=100, help="steps between checkpoints")
    for name, kind in Settings.__annotations__.items():
        parser.add_argument(f"--{name}", type=kind, default=getattr(Settings, name))
    args = vars(parser.parse_args())
    folder, processes, save_every = args.pop("folder"), args.pop("processes"), args.pop("save_every")
    settings = Settings(**args)
    with locked(folder, "a pretraining"):
        folder.mkdir(parents=True, exist_ok=True)
        start = folder / "start"
        if not start.is_dir():
            build_model_folder(start, family="qwen2_vl", seed=settings.seed, size=BASE, corpus=corpus())
        start_processes(run_process, args=(processes, folder, settings, save_every), nprocs=processes)


if __name__ == "__main__":
    main()
