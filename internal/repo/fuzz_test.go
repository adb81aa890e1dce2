package repo

import (
	"bytes"
	"encoding/json"
	"testing"

	"github.com/backstay/backstay/internal/blob/mem"
	"github.com/backstay/backstay/internal/repo/internal/object"
	"github.com/backstay/backstay/internal/secret"
)

// Repositories lie on other people's disks. Whatever the small objects say,
// checksums included, reading them must not panic nor take much memory.
func FuzzSmallObjects(f *testing.F) {
	st := mem.New()
	if err := Init(bg, st, InitOptions{ChunkBytes: testChunk, Passphrase: password, KDF: cheap, Parity: true}); err != nil {
		f.Fatal(err)
	}
	full, err := Open(bg, st, testKey)
	if err != nil {
		f.Fatal(err)
	}
	keyless, err := OpenKeyless(bg, st)
	if err != nil {
		f.Fatal(err)
	}
	if _, err := backup(bg, full, "web01", text(1, 5000), nil, nil); err != nil {
		f.Fatal(err)
	}
	for o := range st.List(bg, "") {
		if b, err := readObject(bg, st, o.Name); err == nil && bytes.HasPrefix(b, []byte("{")) {
			f.Add(b)
		}
	}
	id, _, err := newID()
	if err != nil {
		f.Fatal(err)
	}
	name := id + "-000000"
	f.Fuzz(func(t *testing.T, data []byte) {
		for _, b := range [][]byte{data, mended(data)} {
			parseConfig(b)
			decodeQuarantine(quarantinePrefix+id, b)
			full.decodeRecord(name, b)
			keyless.decodeRecord(name, b)
			other := mem.New()
			put(bg, other, outcomePrefix+id, b)
			put(bg, other, keysPrefix+"0123456789abcdef", b)
			r := &Repository{st: other, id: full.id, conf: full.conf}
			r.outcomeOf(bg, id)
			(&Keyring{st: other, id: full.id, derived: full.keys}).List(bg)
			if k, _, err := readKey(bg, other, keysPrefix+"0123456789abcdef"); err == nil && k.MemoryKiB < 4096 && k.Passes < 4 {
				k.unwrap(bg, "key", r.id, Key{Passphrase: secret.New([]byte("x")), Keeper: xorKeeper(1)})
			}
		}
		// A record that was sealed by somebody with the keys.
		b, err := object.EncodeSealed(clearRecord{Format: 1}, &full.keys.Meta, object.Binding{Repo: full.id, Name: pointPrefix + name}, data)
		if err != nil {
			t.Fatal(err)
		}
		if rec, err := full.decodeRecord(name, b); err == nil && rec.point == nil {
			t.Error("a record without a point")
		}
	})
}

// mended gives data a checksum that is right, if it is JSON at all.
func mended(data []byte) []byte {
	var v map[string]any
	if json.Unmarshal(data, &v) != nil {
		return data
	}
	delete(v, "blake3")
	b, err := object.Encode(v)
	if err != nil {
		return data
	}
	return b
}
