"""Real processes of main.py in milliseconds: one process imports torch and reads the data once, and forks the others.

Requests and answers are lines of JSON. {"argv", "stdout", "stderr", ...} starts main.py in a child, with its output in
files, and answers its process id; {"wait": pid} answers its exit status. Other keys of the first kind:
    env: changes of the environment; None takes a variable away.
    all_images: all images of CIFAR-10, rather than the first TRAIN_IMAGES and TEST_IMAGES; VALIDATION_IMAGES of
        the training images are for validation.
    pictures: draw those of the report, rather than write files that only say what they are of. It takes 1.5 s.
    threads: of torch.
    patch: Python source that the child executes before it starts.
"""

import json
import os
import signal
import sys
import time
import traceback
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
TRAIN_IMAGES = 2_500  # 2,000 to train: ten steps an epoch at a batch of 200
VALIDATION_IMAGES = 500
TEST_IMAGES = 1_000


def child(argv, stdout, stderr, data, env, all_images, pictures, threads, patch):
    for number, path in ((1, stdout), (2, stderr)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    status = 1
    try:
        import torch

        import main
        from core.compile import worker
        from core.data import datasets, loader
        from core.report import plots
        from core.spec import CIFAR10

        for key, value in env.items():
            os.environ.pop(key, None) if value is None else os.environ.update({key: value})
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup, which ignores it, or in the
        signal.signal(signal.SIGINT, signal.default_int_handler)  # background of a shell, which ignores this one
        torch.set_num_threads(threads)
        load = datasets.load
        datasets.load = lambda *where: data[all_images] if where[:2] == ("cifar10", FOLDER) else load(*where)
        if not all_images:
            check, split, few = loader.check, loader.split, replace(CIFAR10, held_out=VALIDATION_IMAGES // 10)
            loader.check = lambda found, spec: None if found.info == CIFAR10 else check(found, spec)
            loader.split = lambda labels, info=CIFAR10: split(labels, few if info == CIFAR10 else info)
        if not pictures:
            plots.draw = lambda picture: b"<dc:identifier>" + 10 * plots.identifier(picture)
        exec(patch, {})
        status = main.main(argv)
        if status == worker.STOPPED:
            worker._end_process()  # as when main.py ends: work that goes on in the background leaves nothing behind
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    os._exit(status)


def wait(pid, seconds=300):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    return "it hangs"


def serve():
    import torch._dynamo  # noqa: F401 - here, so that no child has to; an eager step imports it, too

    import main  # noqa: F401
    from core import predict, session  # noqa: F401
    from core.data import cifar10
    from core.data.identity import note_published
    from core.report import plots

    everything = cifar10.load(FOLDER)
    parts = {"train": TRAIN_IMAGES, "test": TEST_IMAGES}
    names = {f"{part}_{what}": count for part, count in parts.items() for what in ("images", "labels")}
    few = {name: getattr(everything, name)[:count].clone() for name, count in names.items()}
    data = {True: everything, False: everything._replace(**few)}
    note_published(data[False], cifar10.DIRECTORY_HASH)  # to every child the few images are those of data.dvc
    plots.draw(plots.curves([]))  # matplotlib, too
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            answer = wait(request["wait"])
        else:
            answer = os.fork()
            if not answer:
                child(data=data, **request)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    FOLDER = Path(sys.argv[1])
    serve()
