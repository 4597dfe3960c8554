"""The command `mlx_rgemma.fuse`: fuse trained adapters into their model."""

from __future__ import annotations

import argparse
import sys

from mlx_rgemma import cli
from mlx_rgemma.errors import UserError


def build_parser() -> argparse.ArgumentParser:
    """Return the command's parser: mlx-lm's arguments, and convert's for quantization."""
    parser = cli.make_parser(
        "mlx_rgemma.fuse",
        "Fuse trained adapters into their model.",
        ["--model my-model --adapter-path adapters", "--model my-model -q --save-path fused-q"],
    )
    add = parser.add_argument
    add("--model", help="Folder or Hub repository; without it, the small embedded model.")
    add("--save-path", default="fused_model", help="The new folder. Default: %(default)s.")
    add("--adapter-path", default="adapters", help="Folder of the adapters. Default: %(default)s.")
    add("--upload-repo", metavar="REPO", help="Repository of the Hub to upload the folder to.")
    add("-d", "--dequantize", action="store_true", help="Dequantize the model.")
    add("-q", "--quantize", action="store_true", help="Quantize the fused model, as convert does.")
    add("--q-bits", type=int, help="As for convert.")
    add("--q-group-size", type=int, help="As for convert.")
    add("--q-mode", metavar="MODE", help="As for convert.")
    add("--export-gguf", action="store_true", help=argparse.SUPPRESS)
    add("--gguf-path", help=argparse.SUPPRESS)
    add("--trust-remote-code", action="store_true", help=argparse.SUPPRESS)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit status."""
    args = build_parser().parse_args(argv)
    return cli.run(lambda: _fuse(args))


def _fuse(args: argparse.Namespace) -> None:
    from pathlib import Path

    from mlx_rgemma.checkpoints.upload import check_repository, upload
    from mlx_rgemma.tuner.fuse import Quantize, fuse_checkpoint

    if args.export_gguf:
        raise UserError("--export-gguf: mlx-lm writes no GGUF of this architecture.")
    how = (args.q_bits, args.q_group_size, args.q_mode)
    if not args.quantize and any(value is not None for value in how):
        raise UserError("q-bits, q-group-size and q-mode need -q (quantize).")
    if args.upload_repo is not None:
        check_repository(args.upload_repo)
    quantize = Quantize(args.q_bits, args.q_group_size, args.q_mode or "affine")
    print("Loading pretrained model")
    notes = fuse_checkpoint(
        args.model,
        args.adapter_path,
        args.save_path,
        dequantize=args.dequantize,
        quantize=quantize if args.quantize else None,
        progress=True,
    )
    print(f"Wrote {args.save_path}.")
    for note in notes:
        print(f"Note: {note}")
    if args.upload_repo is not None:
        print(f"Uploaded to {upload(Path(args.save_path), args.upload_repo)}.")


if __name__ == "__main__":
    sys.exit(main())
