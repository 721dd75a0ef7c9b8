"""Certificates of an authority of our own, as QEMU's credentials objects want them."""

from pathlib import Path
from typing import Any, Final

import trustme

__all__ = ["NAME", "credentials"]

NAME: Final = "destination.example"


def credentials(folder: Path, *, of: str = NAME) -> dict[str, Any]:
    """Arguments for the two of a pair: credentials of one authority, the destination's certificate for ``of``.

    They are called ``tls-source`` and ``tls-destination``.
    """
    authority = trustme.CA()
    objects: dict[str, Any] = {}
    for side, endpoint, identity in (("source", "client", "source.example"), ("destination", "server", of)):
        directory = folder / side
        directory.mkdir()
        authority.cert_pem.write_to_path(directory / "ca-cert.pem")
        certificate = authority.issue_cert(identity)
        certificate.private_key_pem.write_to_path(directory / f"{endpoint}-key.pem")
        certificate.cert_chain_pems[0].write_to_path(directory / f"{endpoint}-cert.pem")
        objects[f"{side}_more"] = ["-object", f"tls-creds-x509,id=tls-{side},dir={directory},endpoint={endpoint}"]
    return objects
