package seal

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"testing"

	"filippo.io/age"

	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/repo/internal/vectors"
)

func TestVectors(t *testing.T) {
	type hx = vectors.Hex
	var repo, salt [16]byte
	var nonce [NonceBytes]byte
	var master Key
	in := struct {
		Repo, Master                  hx
		ID, Data, Meta, Sign          hx
		Chunk, ChunkID, RecordKey     hx
		Passphrase                    string
		Passes, MemoryKiB             uint32
		Threads                       uint8
		Salt, WrapNonce, WrappedKey   hx
		SealNonce, Plain, AAD, Sealed hx
	}{
		Repo: vectors.Fill(0, 16), Master: vectors.Fill(0x40, 32), Passphrase: "correct horse", Passes: 1, MemoryKiB: 64, Threads: 1,
		Salt: vectors.Fill(0x80, 16), WrapNonce: vectors.Fill(0x90, 12), SealNonce: vectors.Fill(0xa0, 12),
		Plain: hx("a secret"), AAD: hx("and what it is bound to"), Chunk: hx("a short chunk"),
	}
	fill := func() (wrapped []byte, k *Keys, chunkID, recordKey [32]byte, sealed []byte) {
		copy(repo[:], in.Repo)
		copy(master[:], in.Master)
		copy(salt[:], in.Salt)
		k, err := Derive(master, repo)
		if err != nil {
			t.Fatal(err)
		}
		copy(nonce[:], in.WrapNonce)
		wrapped, err = KDF{in.Passes, in.MemoryKiB, in.Threads}.WrapWith(nonce, master, []byte(in.Passphrase), salt, repo)
		if err != nil {
			t.Fatal(err)
		}
		copy(nonce[:], in.SealNonce)
		sealed = k.Meta.SealWith(nil, nonce, in.Plain, in.AAD)
		chunkID = k.ID.KeyedHash(in.Chunk)
		return wrapped, k, chunkID, k.Data.KeyedHash(chunkID[:]), sealed
	}
	w, k, id, rk, s := fill()
	in.ID, in.Data, in.Meta, in.Sign, in.ChunkID, in.RecordKey, in.WrappedKey, in.Sealed = k.ID[:], k.Data[:], k.Meta[:], k.Sign[:], id[:], rk[:], w, s
	vectors.Load(t, "keys", &in)
	w, k, id, rk, s = fill()
	for _, c := range []struct {
		name      string
		got, want []byte
	}{{"idKey", k.ID[:], in.ID}, {"dataKey", k.Data[:], in.Data}, {"metaKey", k.Meta[:], in.Meta}, {"signKey", k.Sign[:], in.Sign},
		{"chunk id", id[:], in.ChunkID}, {"record key", rk[:], in.RecordKey}, {"wrapped", w, in.WrappedKey}, {"sealed", s, in.Sealed}} {
		if !bytes.Equal(c.got, c.want) {
			t.Errorf("%s is %x, want %x", c.name, c.got, c.want)
		}
	}
	kdf := KDF{in.Passes, in.MemoryKiB, in.Threads}
	if got, err := kdf.Unwrap(in.WrappedKey, []byte(in.Passphrase), salt, repo); err != nil || got != master {
		t.Errorf("unwrap: %v", err)
	}
	if _, err := kdf.Unwrap(in.WrappedKey, []byte("wrong"), salt, repo); !errors.Is(err, fault.ErrKey) {
		t.Errorf("wrong passphrase: %v", err)
	}
}

func TestAgeWraps(t *testing.T) {
	id, err := age.GenerateX25519Identity()
	if err != nil {
		t.Fatal(err)
	}
	other, _ := age.GenerateX25519Identity()
	master, repo := Key{1, 2, 3}, [16]byte{4, 5}
	w, err := WrapAge(master, repo, id.Recipient())
	if err != nil {
		t.Fatal(err)
	}
	if got, err := UnwrapAge(w, repo, other, id); err != nil || got != master {
		t.Errorf("%v", err)
	}
	for name, c := range map[string]struct {
		repo [16]byte
		ids  []age.Identity
	}{"other identity": {repo, []age.Identity{other}}, "no identity": {repo, nil}, "other repository": {[16]byte{9}, []age.Identity{id}}} {
		if _, err := UnwrapAge(w, c.repo, c.ids...); !errors.Is(err, fault.ErrKey) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestCostsFromAFileAreBounded(t *testing.T) {
	for _, k := range []KDF{{}, {1, 1<<20 + 1, 1}, {65, 64, 1}, {1, 1 << 10, 65}, {1, 8, 2}, {0, 64, 1}, {1, 64, 0}} {
		if k.Check() == nil {
			t.Errorf("%+v is let through", k)
		}
	}
	if err := DefaultKDF.Check(); err != nil {
		t.Error(err)
	}
}

// Keys get into errors and logs through what holds them.
func TestNoWayOfPrintingShowsAKey(t *testing.T) {
	k := &Keys{Data: Key{65, 66, 67, 68}}
	js, err := json.Marshal(k)
	if err != nil {
		t.Fatal(err)
	}
	var log strings.Builder
	slog.New(slog.NewJSONHandler(&log, nil)).Info("x", "keys", k, "key", k.Data)
	for _, out := range []string{fmt.Sprintf("%v %+v %#v", k, k, *k), fmt.Sprintf("%x %s %q %d", k.Data, k.Data, k.Data, k.Data), string(js), log.String()} {
		for _, shown := range []string{"ABCD", "41424344", "65 66", "65,66", "0x41"} {
			if strings.Contains(out, shown) {
				t.Errorf("the key shows in %q", out)
			}
		}
	}
}
