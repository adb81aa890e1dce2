#!/usr/bin/env python3
"""Restores one disk from a Backstay repository in a directory.

    BACKSTAY_PASSWORD=… restore.py REPOSITORY                        lists restore points (a recovery key will do)
    BACKSTAY_PASSWORD=… restore.py REPOSITORY VM/ID DISK OUTPUT      writes a raw image

Written from docs/format alone and sharing no code with Backstay, to show that
those pages are enough. It is slow (BLAKE3 in Python: about 100 kB/s) and meant
to be read. Needs the Python package "cryptography" (and, where that is older
than 44, "argon2-cffi") and the command "zstd".
"""
import base64, glob, json, os, struct, subprocess, sys

if __name__ == "__main__":
    if len(sys.argv) not in (2, 5) or sys.argv[1] in ("-h", "--help"):
        asked = len(sys.argv) == 2
        print(__doc__, file=sys.stdout if asked else sys.stderr)
        sys.exit(0 if asked else 2)
    if "BACKSTAY_PASSWORD" not in os.environ:
        sys.exit("set BACKSTAY_PASSWORD to the repository's passphrase")
    if not os.path.exists(os.path.join(sys.argv[1], "repo.json")):
        sys.exit(f"{sys.argv[1]} holds no repository")

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

IV = (0x6A09E667, 0xBB67AE85, 0x3C6EF372, 0xA54FF53A, 0x510E527F, 0x9B05688C, 0x1F83D9AB, 0x5BE0CD19)
PERM = (2, 6, 3, 10, 7, 0, 4, 13, 1, 11, 12, 5, 9, 14, 15, 8)
START, END, PARENT, ROOT, KEYED = 1, 2, 4, 8, 16
M = 0xFFFFFFFF


def compress(cv, words, counter, length, flags):
    s = list(cv) + list(IV[:4]) + [counter & M, counter >> 32, length, flags]
    m = list(words)

    def g(a, b, c, d, x, y):
        s[a] = (s[a] + s[b] + x) & M
        t = s[d] ^ s[a]; s[d] = (t >> 16 | t << 16) & M
        s[c] = (s[c] + s[d]) & M
        t = s[b] ^ s[c]; s[b] = (t >> 12 | t << 20) & M
        s[a] = (s[a] + s[b] + y) & M
        t = s[d] ^ s[a]; s[d] = (t >> 8 | t << 24) & M
        s[c] = (s[c] + s[d]) & M
        t = s[b] ^ s[c]; s[b] = (t >> 7 | t << 25) & M

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

    def chunk(i, root):
        part, cv = data[1024 * i:1024 * i + 1024], start
        blocks = max(1, (len(part) + 63) // 64)
        for b in range(blocks):
            block = part[64 * b:64 * b + 64]
            flags = mode | (START if b == 0 else 0) | (END | (ROOT if root else 0) if b == blocks - 1 else 0)
            cv = compress(cv, struct.unpack("<16I", block.ljust(64, b"\0")), i, len(block), flags)
        return cv

    def tree(first, n, root):
        if n == 1:
            return chunk(first, root)
        left = 1 << (n - 1).bit_length() - 1
        words = tree(first, left, False) + tree(first + left, n - left, False)
        return compress(start, words, 0, 64, mode | PARENT | (ROOT if root else 0))

    return struct.pack("<8I", *tree(0, max(1, (len(data) + 1023) // 1024), True))


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


def unzstd(frame, size):
    out = subprocess.run(["zstd", "-dcq"], input=frame, stdout=subprocess.PIPE, check=True).stdout
    must(len(out) == size, "zstd frame")
    return out


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
    """The disk's size, its pages as {number: [id or None]}, and the base's id."""
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
        at = struct.unpack("<%dH" % m, unzstd(unseal(key, page[len(clear):], head + clear), 2 * m))
        pages[no] = [ids[k - 1] if k else None for k in at]
    return size, pages, head[56:88] if head[40] else None


# ---- packs ----

def all_records():
    """Where each chunk lies: from the packs' trailers, so no index is needed. One
    that was found damaged may have been stored again, so there may be several."""
    where = {}
    for name in names("data"):
        b = read(name)
        if b[-32:-24] != b"BSTYPKF1":
            print("passing over " + name + ", whose end is lost", file=sys.stderr)
            continue
        n, = struct.unpack_from("<I", b, len(b) - 24)
        for i in range(n):
            e = len(b) - 32 - 48 * (n - i)
            where.setdefault(b[e:e + 32], []).append((name, struct.unpack_from("<I", b, e + 32)[0]))
    return where


def chunk(where, cid):
    must(cid in where, "chunk %s is in no pack" % cid.hex())
    for name, off in where[cid]:
        try:
            return record(where, cid, name, off)
        except (Exception, SystemExit) as e:
            print("passing over a damaged record in %s: %s" % (name, e), file=sys.stderr)
    sys.exit("corrupt: chunk " + cid.hex())


def record(where, cid, name, off):
    b = read(name)[off:]
    enc, (clen, plen) = b[8], struct.unpack_from("<II", b, 12)
    must(b[:8] == b"BSTYREC1" and b[24:56] == cid, name)
    body = unseal(blake3(cid, DATA), b[64:64 + 28 + clen], ID + cid + bytes([enc]) + struct.pack("<I", plen))
    if enc == 1:
        body = unzstd(body, plen)
    elif enc == 2:
        base, bits = bytearray(chunk(where, body[:32])), body[40:40 + struct.unpack_from("<I", body, 36)[0]]
        hit = [k for k in range((plen + 4095) // 4096) if bits[k // 8] >> k % 8 & 1]
        new = unzstd(body[40 + len(bits):], sum(min(4096, plen - 4096 * k) for k in hit))
        for k in hit:
            base[4096 * k:4096 * k + 4096], new = new[:min(4096, plen - 4096 * k)], new[4096:]
        body = bytes(base)
    must(len(body) == plen and blake3(body, IDKEY) == cid, name)
    return body


def main():
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
    where = all_records()
    with open(output, "wb") as out:
        out.truncate(size)
        for no, ids in sorted(pages.items()):
            for k, cid in enumerate(ids):
                if cid:
                    out.seek((1024 * no + k) * CHUNK)
                    out.write(chunk(where, cid))


REPO = sys.argv[1] if len(sys.argv) > 1 else sys.exit(__doc__)
if __name__ == "__main__":
    main()
