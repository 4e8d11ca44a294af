"""Step e: a certificate is worth something only where it belongs."""

from __future__ import annotations

from meshbridge.demo import svid
from meshbridge.demo.walk.context import Walk, now_ns
from meshbridge.observe.flow import FlowKind, FlowVerdict

LETTER = "e"
TITLE = "A certificate from the wrong address"
ABOUT = (
    "finance/reporter has no sidecar and speaks TLS itself. It presents the certificate of finance/client: the\n"
    "network policy lets finance in, the certificate is the mesh's, the token is right; but whose address is it?"
)
CLIENT, VICTIM = "finance/reporter", "finance/client"


def run(walk: Walk) -> None:
    service, reporter = walk.service, walk.pod(CLIENT)
    token = walk.token(scope="transactions")
    for owner, name in ((walk.pod(VICTIM), "finance/client's certificate"), (reporter, "its own certificate")):
        stolen = owner.key != reporter.key
        files = svid.fetch(owner, reporter)
        options = ("--cert", str(files.certificate), "--key", str(files.key), "--root", str(files.root))
        for family in ("4", "6"):
            since, before = now_ns(), walk.arrived()
            outcome = walk.request(reporter, walk.url(family), *options, token=token)
            flow = walk.wait_flow(service.node, since, FlowKind.VERDICT, reporter, service, family)
            reached = walk.arrived().since(before, "bytes")
            allowed = flow is not None and flow.verdict is FlowVerdict.ALLOWED
            walk.report.check(
                f"{name}, IPv{family}: the kernel says ALLOWED",
                allowed,
                flow.verdict.value if flow else "no event",
                f"{service.node}'s events",
            )
            if stolen:
                explained = outcome.headers.get("x-meshbridge-reason") == "identity-differs"
                walk.report.check(
                    f"{name}, IPv{family}: refused by us, and it says why",
                    outcome.status == 403 and explained and reached == 0,
                    f"{outcome}, {outcome.explanation or 'without a word'}; {reached} bytes at the application",
                    "the client's answer, counters of the application",
                )
            else:
                walk.report.check(
                    f"{name}, IPv{family}: 200",
                    outcome.status == 200 and reached > 0,
                    f"{outcome}; {reached} bytes at the application",
                    "the client's answer, counters of the application",
                )
