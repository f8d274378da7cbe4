"""What the codec keeps of a corpus, before anyone trains: bits, codebook use, resynthesis, the worst clips."""

from collections.abc import Sequence

from valle.config import parse
from valle.evaluation.codec_audit import AuditConfig, audit_codec, format_audit
from valle.utils.command import run
from valle.utils.log import setup_logger


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, audit, print."""
    (config,) = parse(__doc__ or "", [AuditConfig], argv, prog="audit_codec.py")
    setup_logger()
    results, folder = audit_codec(config)
    print(format_audit(results))
    print(f"\naudit: {folder}/audit.json, {folder}/audit.html")


if __name__ == "__main__":
    run(main)
