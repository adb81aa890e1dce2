package hyperv

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/backstay/backstay/internal/hypervisor"
	"github.com/backstay/backstay/internal/image"
	"github.com/backstay/backstay/internal/image/imagetest"
	"github.com/backstay/backstay/internal/smb"
)

// A stamped is a file that says when it was written.
type stamped struct {
	image.File
	written time.Time
}

func (s stamped) Info() smb.Info { return smb.Info{Written: s.written} }

// onlyFile is a node's files where it has a single one, whatever its name.
type onlyFile struct {
	files
	image.File
}

func (o onlyFile) open(context.Context, string) (image.File, error) { return o.File, nil }

// What another node shows under a frozen file's name is read on only if it is
// that file: as it is opened, and once more before the commit.
func TestAnotherFileIsNotReadOn(t *testing.T) {
	data := make([]byte, 300<<10)
	random := rand.NewChaCha8([32]byte{2})
	random.Read(data)
	written := time.Unix(1_800_000_000, 0)
	with := func(at int) []byte {
		out := bytes.Clone(data)
		out[at]++
		return out
	}
	like, err := look(t.Context(), stamped{imagetest.Bytes("a.vhdx", data), written})
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		data    []byte
		written time.Time
		same    bool
	}{
		"the same":               {data, written, true},
		"longer":                 {append(bytes.Clone(data), 0), written, false},
		"shorter":                {data[:len(data)-1], written, false},
		"written to later":       {data, written.Add(100), false},
		"another identity":       {with(0), written, false},
		"another header":         {with(headBytes - 1), written, false},
		"another end":            {with(len(data) - 1), written, false},
		"another footer's begin": {with(len(data) - tailBytes), written, false},
	} {
		t.Run(name, func(t *testing.T) {
			d := &Driver{files: onlyFile{File: stamped{imagetest.Bytes("a.vhdx", c.data), c.written}}, openTime: time.Minute}
			m := &movable{name: "a.vhdx", like: like, at: d, turn: 1}
			r := &roamer{opened: []*movable{m}}
			m.r = r
			f, err := m.reopen(t.Context(), d)
			if c.same {
				if err != nil {
					t.Fatal(err)
				}
				f.Close()
				if err := r.unchanged(t.Context()); err != nil {
					t.Error(err)
				}
				return
			}
			if !errors.Is(err, smb.ErrChanged) {
				t.Errorf("opened: %v", err)
			}
			s := &session{beginning: &beginning{roam: r}}
			if err := s.Check(t.Context()); !errors.As(err, new(*hypervisor.RetryError)) || !errors.Is(err, smb.ErrChanged) {
				t.Errorf("committed: %v", err)
			}
		})
	}
}
