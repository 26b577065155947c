"""Keys in URLs are seen by nobody."""

import pytest

from sharding.redact import redact

SECRETS = ["AKIASECRET", "s3cr3t"]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("s3://AKIASECRET:s3cr3t@bucket/a b", "s3://***@bucket/a b"),
        ("https://host/x.tar?X-Amz-Signature=s3cr3t&X-Amz-Credential=AKIASECRET", "https://host/x.tar?***"),
        (
            "cannot read 'https://u:s3cr3t@host:81/x?sig=s3cr3t': gone; try",
            "cannot read 'https://***@host:81/x?***': gone; try",
        ),
        ("webdataset:https://AKIASECRET@h/{000..009}.tar?token=s3cr3t", "webdataset:https://***@h/{000..009}.tar?***"),
        ("data: gs://u:s3cr3t@b/x\nout: runs/a", "data: gs://***@b/x\nout: runs/a"),
        ("no dataset in https:/u:s3cr3t@host/x?t=s3cr3t (gone)", "no dataset in https:/***@host/x?*** (gone)"),
        ("folder:/home/me/a@b/x", "folder:/home/me/a@b/x"),
        ("https://host/plain.tar", "https://host/plain.tar"),
        ("mail me@host or see C:\\x?y", "mail me@host or see C:\\x?y"),
    ],
)
def test_the_user_part_and_the_query_of_a_url_are_hidden_and_nothing_else(text, shown):
    assert redact(text) == shown
    assert not any(secret in redact(text) for secret in SECRETS)
