"""``massl-fast train``."""

from __future__ import annotations

import argparse
import sys

from massl_fast.config import describe_settings, load_config, recipe_names

TAKES_SETTINGS = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "massl-fast train --recipe NAME|FILE [--section.key VALUE ...]"
    parser.add_argument("--recipe", required=True, help=f"one of {', '.join(recipe_names())}, or the path of a YAML file")
    parser.add_argument("--print-config", action="store_true", help="print the resolved settings and exit")
    parser.epilog = f"Settings, each --section.key VALUE:\n{describe_settings()}"


def run(args: argparse.Namespace) -> int:
    config = load_config(args.recipe, args.settings)
    if args.print_config:
        import yaml

        print(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False), end="")
        return 0
    from massl_fast.engine.ended import Ended, RankLost
    from massl_fast.engine.heartbeat import end_process
    from massl_fast.engine.parallel import join_world, leave_world
    from massl_fast.engine.trainer import Trainer

    world = join_world(config.train.device, config.parallel.timeout_seconds)
    try:
        Trainer(config, world).run()
    except RankLost as error:
        end_process(str(error))  # leaving the process group would wait for the rank that is gone
    except Ended as error:
        if world.is_main:  # all ranks end so, one speaks
            print(f"massl-fast train: {error}", file=sys.stderr)
        return error.exit_code
    finally:
        leave_world()
    return 0
