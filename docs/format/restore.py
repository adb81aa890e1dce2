#!/usr/bin/env python3
"""Restores one disk from a Backstay repository in a directory.

    BACKSTAY_PASSWORD=… restore.py REPOSITORY                        lists restore points (a recovery key will do)
    BACKSTAY_PASSWORD=… restore.py REPOSITORY VM/ID DISK OUTPUT      writes a raw image

Written from docs/format alone and sharing no code with Backstay, to show that
those pages are enough. It needs no index, verifies every chunk by its id, and is
meant to be read: its BLAKE3 is Python's own integers, some 12 MB/s. Needs the
Python packages "cryptography", "zstandard" and, where the first is older than
44, "argon2-cffi": Debian's python3-cryptography, -zstandard and -argon2.
"""
import base64, functools, glob, json, os, struct, sys
from array import array

if __name__ == "__main__":
    if len(sys.argv) not in (2, 5) or sys.argv[1] in ("-h", "--help"):
        asked = len(sys.argv) == 2
        print(__doc__, file=sys.stdout if asked else sys.stderr)
        sys.exit(0 if asked else 2)
    if "BACKSTAY_PASSWORD" not in os.environ:
        sys.exit("set BACKSTAY_PASSWORD to the repository's passphrase")
    if not os.path.exists(os.path.join(sys.argv[1], "repo.json")):
        sys.exit(f"{sys.argv[1]} holds no repository")

import zstandard
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.hazmat.primitives import hashes

try:
    from cryptography.hazmat.primitives.kdf.argon2 import Argon2id

    def argon2id(password, salt, passes, kib, threads):
        return Argon2id(salt=salt, length=32, iterations=passes, lanes=threads, memory_cost=kib).derive(password)
except ImportError:  # an older cryptography
    from argon2.low_level import Type, hash_secret_raw

    def argon2id(password, salt, passes, kib, threads):
        return hash_secret_raw(password, salt, passes, kib, threads, 32, Type.ID)

# ---- BLAKE3, 32 bytes of output ----
#
# All chunks of an input are hashed at once: a word of the state is one large
# integer that has this word of chunk i in its bits 64 i to 64 i + 31. The upper
# half of each lane takes the carries, until they are masked away.

IV = (0x6A09E667, 0xBB67AE85, 0x3C6EF372, 0xA54FF53A, 0x510E527F, 0x9B05688C, 0x1F83D9AB, 0x5BE0CD19)
PERM = (2, 6, 3, 10, 7, 0, 4, 13, 1, 11, 12, 5, 9, 14, 15, 8)
START, END, PARENT, ROOT, KEYED = 1, 2, 4, 8, 16


@functools.lru_cache(64)
def ones(lanes):
    return int.from_bytes(b"\1\0\0\0\0\0\0\0" * lanes, "little")


def join(words):
    return int.from_bytes(array("Q", words).tobytes(), "little")


def split(word, lanes):
    return array("Q", word.to_bytes(8 * lanes, "little"))


def compress(lanes, cv, m, counters, length, flags):
    one = ones(lanes)
    mask = one * 0xFFFFFFFF
    s = list(cv) + [one * x for x in IV[:4]] + [counters & mask, counters >> 32 & mask, one * length, one * flags]

    def g(a, b, c, d, x, y):
        s[a] = (s[a] + s[b] + x) & mask
        t = s[d] ^ s[a]; s[d] = (t >> 16 | t << 16) & mask
        s[c] = (s[c] + s[d]) & mask
        t = s[b] ^ s[c]; s[b] = (t >> 12 | t << 20) & mask
        s[a] = (s[a] + s[b] + y) & mask
        t = s[d] ^ s[a]; s[d] = (t >> 8 | t << 24) & mask
        s[c] = (s[c] + s[d]) & mask
        t = s[b] ^ s[c]; s[b] = (t >> 7 | t << 25) & mask

    for r in range(7):
        g(0, 4, 8, 12, m[0], m[1]); g(1, 5, 9, 13, m[2], m[3])
        g(2, 6, 10, 14, m[4], m[5]); g(3, 7, 11, 15, m[6], m[7])
        g(0, 5, 10, 15, m[8], m[9]); g(1, 6, 11, 12, m[10], m[11])
        g(2, 7, 8, 13, m[12], m[13]); g(3, 4, 9, 14, m[14], m[15])
        if r < 6:
            m = [m[i] for i in PERM]
    return [s[i] ^ s[i + 8] for i in range(8)]


def blake3(data, key=None):
    start, mode = (struct.unpack("<8I", key), KEYED) if key else (IV, 0)
    whole = max(0, len(data) - 1) // 1024  # chunks before the last, which may be short
    alone = ROOT if whole == 0 else 0
    nodes = [array("Q") for _ in range(8)]  # by word, one for each chunk
    if whole:
        words = memoryview(data)[:1024 * whole].cast("I")
        cv, counters = [ones(whole) * x for x in start], join(range(whole))
        for b in range(16):
            m = [join(words[16 * b + w::256]) for w in range(16)]
            cv = compress(whole, cv, m, counters, 64, mode | (START if b == 0 else 0) | (END if b == 15 else 0))
        nodes = [split(x, whole) for x in cv]
    rest, cv = data[1024 * whole:], start
    blocks = max(1, (len(rest) + 63) // 64)
    for b in range(blocks):
        block = rest[64 * b:64 * b + 64]
        flags = mode | (START if b == 0 else 0) | (END | alone if b == blocks - 1 else 0)
        cv = compress(1, cv, struct.unpack("<16I", block.ljust(64, b"\0")), whole, len(block), flags)
    for word, x in zip(nodes, cv):
        word.append(x)
    # Neighbours become parents, level by level; an odd one at the end goes up as it is.
    while (n := len(nodes[0])) > 1:
        pairs = n // 2
        m = [join(word[k:2 * pairs:2]) for k in (0, 1) for word in nodes]
        cv = compress(pairs, [ones(pairs) * x for x in start], m, 0, 64, mode | PARENT | (ROOT if n == 2 else 0))
        nodes = [split(x, pairs) + word[2 * pairs:] for x, word in zip(cv, nodes)]
    return struct.pack("<8I", *(word[0] for word in nodes))


def crc32c(data):
    crc = 0xFFFFFFFF
    for x in data:
        crc ^= x
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


# ---- objects ----

def read(name):
    with open(os.path.join(REPO, name), "rb") as f:
        return f.read()


def must(ok, what):
    if not ok:
        sys.exit("corrupt: " + what)


def small(name):
    """A small object: its fields and the bytes before its checksum."""
    b = read(name)
    front = b[:-77]
    must(b[len(front):] == b'"blake3":"%s"}\n' % blake3(front).hex().encode(), name)
    return json.loads(b), front


def unseal(key, sealed, aad):
    return AESGCM(key).decrypt(sealed[:12], sealed[12:], aad)


def sealed_part(name):
    fields, front = small(name)
    clear = front[:front.rindex(b'"sealed":"')]
    return fields, unseal(META, base64.b64decode(fields["sealed"]), ID + name.encode() + b"\0" + clear)


def names(prefix):
    found = glob.glob(os.path.join(REPO, prefix, "**"), recursive=True)
    return sorted(os.path.relpath(p, REPO) for p in found if os.path.isfile(p))


def unzstd(frame, most):
    return zstandard.ZstdDecompressor().decompress(frame, max_output_size=most)


def open_repository(password):
    global ID, IDKEY, DATA, META, CHUNK
    conf, front = small("repo.json")
    must(conf["format"] == 1 and conf["features"] == [], "or newer: repo.json")
    ID, CHUNK = bytes.fromhex(conf["id"]), conf["chunk_bytes"]
    for name in names("keys"):
        k, _ = small(name)
        if k["kind"] not in ("passphrase", "recovery"):
            continue
        typed = password
        if k["kind"] == "recovery":
            typed = password.upper().translate(bytes.maketrans(b"OIL", b"011"), b" -")
        kek = argon2id(typed, bytes.fromhex(k["salt"]), k["passes"], k["memory_kib"], k["threads"])
        try:
            master = unseal(kek, bytes.fromhex(k["wrapped"]), b"backstay v1 key" + ID)
        except Exception:
            continue
        derive = lambda info: HKDF(hashes.SHA256(), 32, ID, b"backstay v1 " + info).derive(master)
        IDKEY, DATA, META = derive(b"chunk id"), derive(b"chunk data"), derive(b"metadata")
        mac = b'"mac":"%s",' % blake3(front[:-len('"mac":"",') - 64], derive(b"signature")).hex().encode()
        must(front.endswith(mac), "repo.json: its MAC")
        return
    sys.exit("no key fits")


def points():
    for name in names("rp"):
        rp = name[len("rp/"):]
        try:
            outcome, _ = small("outcome/" + rp.split("-")[0])
        except FileNotFoundError:
            continue
        if outcome["state"] == "committed" and rp in outcome.get("points", []):
            yield json.loads(sealed_part(name)[1])


# ---- manifests ----

def manifest(hex_id):
    """The disk's size, its pages as {number: [(record's id or None, its base's or None)]}, and the id of the manifest's own base."""
    b = read("man/%s/%s" % (hex_id[:2], hex_id))
    head, foot = b[:128], b[-32:]
    must(head[:8] == b"BSTYMAN1" and foot[:8] == b"BSTYMNF1" and head[8:24] == ID, "manifest")
    n, = struct.unpack_from("<Q", foot, 8)
    table = b[len(b) - 32 - 48 * n:len(b) - 32]
    must(blake3(head + table).hex() == hex_id, "manifest table")
    size, = struct.unpack_from("<Q", head, 48)
    key = blake3(b"backstay v1 manifest" + head[24:40], META)
    pages, off = {}, 128
    for i in range(n):
        no, length, _ = struct.unpack_from("<QII", table, 48 * i)
        page = b[off:off + length]
        off += length
        must(blake3(page) == table[48 * i + 16:48 * i + 48], "page")
        count, _ = struct.unpack_from("<II", page, 16)
        clear = page[:24 + 32 * count]
        ids = [clear[24 + 32 * k:56 + 32 * k] for k in range(count)]
        chunks = (size + CHUNK - 1) // CHUNK
        m = min(1024, chunks - 1024 * no)
        frame = unzstd(unseal(key, page[len(clear):], head + clear), 4 * m)
        must(len(frame) in (2 * m, 4 * m), "positions of a page")
        at = [ids[k - 1] if k else None for k in struct.unpack("<%dH" % (len(frame) // 2), frame)]
        pages[no] = list(zip(at[:m], at[m:] or [None] * m))
    return size, pages, head[56:88] if head[40] else None


# ---- packs ----

def all_records():
    """Where each record lies: from the packs' trailers, so no index is needed. One
    that was found damaged may have been stored again, so there may be several."""
    where = {}
    for name in names("data"):
        with open(os.path.join(REPO, name), "rb") as f:
            for rid, off in records(f, name):
                where.setdefault(rid, []).append((name, off))
    return where


def records(f, name):
    size = f.seek(0, 2)
    f.seek(max(0, size - 32))
    foot = f.read(32)
    n = struct.unpack_from("<I", foot, 8)[0] if foot[:8] == b"BSTYPKF1" else size
    if 64 + 48 * n + 32 <= size:
        f.seek(size - 32 - 48 * n)
        table = f.read(48 * n)
        return [(table[e:e + 32], struct.unpack_from("<I", table, e + 32)[0]) for e in range(0, 48 * n, 48)]
    print("searching " + name + ", whose end is lost", file=sys.stderr)
    f.seek(0)
    pack, found, off = f.read(), [], 64
    while (off := pack.find(b"BSTYREC1", off)) >= 0:
        head = pack[off:off + 64]
        if len(head) == 64 and crc32c(head[:60]) == struct.unpack_from("<I", head, 60)[0]:
            found.append((head[24:56], off))
            off += 92 + struct.unpack_from("<I", head, 12)[0]
        else:
            off += 1
    return found


@functools.lru_cache(16)
def chunk(rid, base):
    """The chunk whose record is rid, an overlay on the chunk base unless that is None."""
    for name, off in WHERE.get(rid, []):
        try:
            return opened(rid, base, name, off)
        except (Exception, SystemExit) as e:
            print("passing over a damaged record in %s: %s" % (name, e), file=sys.stderr)
    if base and chunk_id(rid, base) in WHERE:
        return chunk(chunk_id(rid, base), None)
    sys.exit("record %s is damaged or in no pack" % rid.hex())


def chunk_id(rid, base):
    return bytes(a ^ b for a, b in zip(rid, blake3(b"backstay v1 overlay" + base, META)))


def opened(rid, base, name, off):
    with open(os.path.join(REPO, name), "rb") as f:
        f.seek(off)
        head = f.read(64)
        enc, (clen, plen) = head[8], struct.unpack_from("<II", head, 12)
        must(head[:8] == b"BSTYREC1" and head[24:56] == rid and (enc == 2) == (base is not None), name)
        body = unseal(blake3(rid, DATA), f.read(28 + clen), ID + rid + bytes([enc]) + struct.pack("<I", plen))
    if enc == 1:
        body = unzstd(body, plen)
    if enc == 2:
        must(body[:32] == base, name + ": an overlay on another chunk")
        body = overlay(body, plen)
        rid = chunk_id(rid, base)
    must(len(body) == plen and blake3(body, IDKEY) == rid, name)
    return body


def overlay(body, plen):
    how, b, n = body[33], struct.unpack_from("<I", body, 36)[0], (plen + 4095) // 4096
    must(body[32] == 12 and how < 2 and b == (n + 7) // 8, "overlay")
    bits = lambda at: [k for k in range(n) if body[at + k // 8] >> k % 8 & 1]
    differ, xored = bits(40), set(bits(40 + b))
    # One that has every block as it is needs no base.
    out = bytearray(plen) if len(differ) == n and not xored else bytearray(chunk(body[:32], None))
    new = body[40 + 2 * b:] if how == 0 else unzstd(body[40 + 2 * b:], plen)
    must(len(out) == plen, "base of an overlay")
    for k in differ:
        was = out[4096 * k:4096 * k + 4096]
        part, new = new[:len(was)], new[len(was):]
        out[4096 * k:4096 * k + len(was)] = bytes(x ^ y for x, y in zip(part, was)) if k in xored else part
    must(not new, "overlay")
    return bytes(out)


def main():
    global WHERE
    open_repository(os.environ["BACKSTAY_PASSWORD"].encode())
    if len(sys.argv) == 2:
        for p in points():
            print(p["vm"] + "/" + p["id"], p["time"], [d["id"] for d in p["disks"]])
        return
    ref, disk, output = sys.argv[2:5]
    found = [d for p in points() if p["vm"] + "/" + p["id"] == ref for d in p["disks"] if d["id"] == disk]
    if not found:
        sys.exit("no such restore point or disk")
    size, pages, base = manifest(found[0]["manifest"])
    if base:
        pages = manifest(base.hex())[1] | pages
    WHERE = all_records()
    with open(output, "wb") as out:
        out.truncate(size)
        for no, ids in sorted(pages.items()):
            for k, (rid, on) in enumerate(ids):
                if rid:
                    out.seek((1024 * no + k) * CHUNK)
                    out.write(chunk(rid, on))


REPO = sys.argv[1] if len(sys.argv) > 1 else sys.exit(__doc__)
if __name__ == "__main__":
    main()
