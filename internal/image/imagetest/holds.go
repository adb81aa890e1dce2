package imagetest

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"io"
	"os"
	"testing"
)

// Holds fails t unless the first size bytes of r have the SHA-256 that
// INDEX.md gives for a sample. Of the large ones, which are nearly all zeros,
// it takes the digest instead, and with BACKSTAY_SOAK=1 both.
func Holds(t testing.TB, r io.ReaderAt, size int64, sha256 string) {
	t.Helper()
	known, large := digests[sha256]
	if large {
		if got := digest(t, r, size); got != known {
			t.Errorf("digest %s, want %s", got, known)
		}
	}
	if !large || os.Getenv("BACKSTAY_SOAK") == "1" {
		if got := Hash(t, r, size); got != sha256 {
			t.Errorf("hash %s, want %s", got, sha256)
		}
	}
}

// digests are those of contents with the SHA-256 that is their key: each was
// taken of bytes that had it.
var digests = map[string]string{
	// cot/blank-old.vmdk
	"ebfb4ef19ae410f190327b5ebd312711263bc7579970e87d9c1e2d84e06b3c25": "2fcd151b8295e8b3bf8ec64ede173523417960a8db6cbc569de9a25a458f9135",
	// discutils/btrfs.vhdx
	"0b959f9cb4e18348ad8b646f152178282542c8304f02fddf765e3fd1a1de6864": "f76ec56fa2da5cbf9495ac8ce6b944539a6a7c74556cd911c259898a087ed49c",
	// discutils/swap.vhdx
	"60dd30b4c74361427d1089510cabb36e2eeda0cc4747f467ea43173acd358c49": "9ed33345a7ee13898d938a6120092abb8569682d7388d7d25a4ef010b4d566d9",
	// discutils/vhdx-log-replay.vhdx
	"3ba3b309425b7ff5e8e0199edceed95226250f880c53b24e8eae93865f3fad5e": "e0b2571a72054d7b3ec3ec636df4c22f57f21d8ded6c1ed2084b74ab4d14b110",
	// dissect/backing-chain-1.qcow2
	"186334af67c1acb54b08ded0b6a419571000755d4c810c8b768a30281e2ab074": "652f4af6fe8ab300cab0b9817487c0f33a186c815ce02cc58ba8da3422c36d30",
	// dissect/backing-chain-2.qcow2
	"8e2e850f2a31828f6f053f70f1fbfa71a42ce0571c6d8cd2a7ca0e21e1db8341": "a273a7c227f8cce6b08446f4b66ca4625b5121feaf36dbe0c4584929eb16460a",
	// dissect/backing-chain-3.qcow2
	"4a57a3a5c273c7c1144743ecafc7b23181f6e23c8abad104493a63a3599bd276": "5e54b4a1930ef60cf46ed854bd49f31c700799a324cff375f7d5e830fa51f53f",
	// dissect/basic-zstd.qcow2
	"3c86a52ad19ebbe34acffb812d276817ddca56522eb72de2b984d70ffb20582f": "09ad3b736f509c6026a1203a2a0b2038a23244fb45eb9e0007cd12eab7e64825",
	// dissect/sesparse.vmdk
	"3afa48010241335528fe402f083fc9f3a1013a49485221443a78d9a8604e2f90": "c8857c599a83c021eea0b3815a67c6c55223bbea976369175431ff7e006cf137",
	// qemu-iotests/iotest-version3.vmdk
	"0859bb3397bc1d30fa979c80a289ce98bfd6c1141a64594d6f3cc8cd68218faf": "face9b4509f241c158cc08fd07d0fbba7410436a3a84b91cd250834fb2cf858b",
}

// digest is the SHA-256 of the size of a disk and of those of its MiB that are
// not zeros, each behind its place. It tells disks apart as SHA-256 does, and
// takes no longer than to read them.
func digest(t testing.TB, r io.ReaderAt, size int64) string {
	t.Helper()
	h := sha256.New()
	number := func(n int64) { h.Write(binary.LittleEndian.AppendUint64(nil, uint64(n))) }
	number(size)
	var p []byte
	for off := int64(0); off < size; off += 1 << 20 {
		p = append(p[:0], stale[:min(1<<20, size-off)]...)
		if n, err := r.ReadAt(p, off); n != len(p) {
			t.Fatalf("ReadAt(%d bytes, %d) = %d, %v", len(p), off, n, err)
		}
		if !isZero(p) {
			number(off)
			h.Write(p)
		}
	}
	return hex.EncodeToString(h.Sum(nil))
}
