package object

import (
	"bytes"
	"errors"
	"testing"

	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/repo/internal/seal"
	"github.com/backstay/backstay/internal/repo/internal/vectors"
)

type fields struct {
	Format int      `json:"format"`
	List   []string `json:"list"`
}

func TestVectors(t *testing.T) {
	in := struct {
		Repo, Key, Nonce   vectors.Hex
		Name, Secret       string
		Plain, MAC, Sealed string // the whole files
	}{Repo: vectors.Fill(0, 16), Key: vectors.Fill(0x40, 32), Nonce: vectors.Fill(0x90, 12), Name: "rp/01jd9x0000000000000000000000-000000", Secret: `{"id":"x"}`}
	v := fields{1, []string{"a", "b"}}
	make := func() (a, b, c []byte) {
		a, err1 := Encode(v)
		key := seal.Key(in.Key)
		b, err2 := EncodeMAC(v, &key)
		c, err3 := encodeSealed(v, &key, [12]byte(in.Nonce), Binding{[16]byte(in.Repo), in.Name}, []byte(in.Secret))
		if err := errors.Join(err1, err2, err3); err != nil {
			t.Fatal(err)
		}
		return a, b, c
	}
	a, b, c := make()
	in.Plain, in.MAC, in.Sealed = string(a), string(b), string(c)
	vectors.Load(t, "objects", &in)
	a, b, c = make()
	if string(a) != in.Plain || string(b) != in.MAC || string(c) != in.Sealed {
		t.Errorf("%s%s%s", a, b, c)
	}
	var got fields
	key := seal.Key(in.Key)
	if err := Decode("x", a, &got); err != nil || got.List[1] != "b" {
		t.Error(err)
	}
	if err := DecodeMAC("x", b, &key, &got); err != nil {
		t.Error(err)
	}
	if err := DecodeMAC("x", b, &seal.Key{}, &got); !errors.Is(err, fault.ErrCorrupt) {
		t.Errorf("another key: %v", err)
	}
	bind := Binding{[16]byte(in.Repo), in.Name}
	if s, err := DecodeSealed("x", c, &key, bind, &got); err != nil || string(s) != in.Secret {
		t.Errorf("%q, %v", s, err)
	}
	bind.Name = "rp/another"
	if _, err := DecodeSealed("x", c, &key, bind, &got); !errors.Is(err, fault.ErrCorrupt) {
		t.Errorf("under another name: %v", err)
	}
}

// Repositories lie on other people's disks. Whatever the bytes say, decoding
// must not panic, and nothing that was not sealed with the key comes out.
func FuzzDecode(f *testing.F) {
	key := seal.Key{1}
	bind := Binding{Name: "rp/x"}
	a, _ := Encode(fields{1, []string{"a"}})
	b, _ := EncodeMAC(fields{1, nil}, &key)
	c, _ := EncodeSealed(fields{1, []string{"b"}}, &key, bind, []byte("secret"))
	for _, s := range [][]byte{a, b, c, nil, []byte("{}")} {
		f.Add(s, false)
		f.Add(s, true)
	}
	f.Fuzz(func(t *testing.T, data []byte, mend bool) {
		if mend { // make the checksum right, to get behind it
			data = append(bytes.Clone(data), tail(data)...)
		}
		var v fields
		Decode("x", data, &v)
		DecodeMAC("x", data, &key, &v)
		if s, err := DecodeSealed("x", data, &key, bind, &v); err == nil && string(s) != "secret" {
			t.Errorf("opened %q", s)
		}
	})
}
