package hyperv

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"strings"
	"testing"
	"time"

	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/image"
	"github.com/backstay/backstay/sim/hyperv/cim"
)

// odd are a host's files, of which some are not what they should be.
type odd struct {
	files
	change func(name string) (image.File, error) // nil, nil for the file as it is
}

func (o odd) open(ctx context.Context, name string) (image.File, error) {
	if f, err := o.change(name); f != nil || err != nil {
		return f, err
	}
	f, err := o.files.open(ctx, name)
	if err != nil {
		return nil, err
	}
	return inMemory(name, f)
}

// memory is a file that is identified by name, as one on a share is.
type memory struct {
	*bytes.Reader
	name string
}

func inMemory(name string, f image.File) (*memory, error) {
	defer f.Close()
	p := make([]byte, f.Bytes())
	if _, err := f.ReadAt(p, 0); err != nil && err != io.EOF {
		return nil, err
	}
	return &memory{bytes.NewReader(p), name}, nil
}

func (m *memory) Bytes() int64     { return m.Size() }
func (m *memory) Name() string     { return m.name }
func (m *memory) Identity() string { return m.name }
func (m *memory) Close() error     { return nil }

// unreplayed gives what a VHDX is whose host lost power: its log has a block's
// first page of zeros that did not reach the block.
func unreplayed(vhdx []byte, block int64) []byte {
	le := binary.LittleEndian
	castagnoli := crc32.MakeTable(crc32.Castagnoli)
	guid := bytes.Repeat([]byte{0x11}, 16)
	var logAt int64
	for _, at := range []int64{64 << 10, 128 << 10} {
		h := vhdx[at : at+4096]
		copy(h[48:64], guid)
		logAt = int64(le.Uint64(h[72:]))
		le.PutUint32(h[4:], 0)
		le.PutUint32(h[4:], crc32.Checksum(h, castagnoli))
	}
	e := vhdx[logAt : logAt+4096]
	clear(e)
	copy(e, "loge")
	le.PutUint32(e[8:], 4096) // bytes of the entry; its tail is at 0
	le.PutUint64(e[16:], 1)   // its number
	le.PutUint32(e[24:], 1)   // descriptors
	copy(e[32:], guid)
	le.PutUint64(e[48:], uint64(len(vhdx)))
	le.PutUint64(e[56:], uint64(len(vhdx)))
	copy(e[64:], "zero")
	le.PutUint64(e[72:], 4096)
	le.PutUint64(e[80:], uint64(block))
	le.PutUint64(e[88:], 1)
	le.PutUint32(e[4:], crc32.Checksum(e, castagnoli))
	return vhdx
}

// A frozen disk whose log was not written back is read as the host would read
// it.
func TestDirtyLog(t *testing.T) {
	s := newSite(t)
	s.write(0, strings.Repeat("a page and another", 8192/18+1)[:8192])
	s.files = odd{simFiles{s.host}, func(name string) (image.File, error) {
		f, err := simFiles{s.host}.open(t.Context(), name)
		if err != nil || !strings.HasSuffix(name, "-0.vhdx") {
			return f, err
		}
		m, err := inMemory(name, f)
		if err != nil {
			return nil, err
		}
		p, _ := io.ReadAll(m)
		block := int64(bytes.Index(p, []byte("a page and another")))
		if block < 0 || block%(1<<20) != 0 {
			return nil, fmt.Errorf("the block is at %d", block)
		}
		return &memory{bytes.NewReader(unreplayed(p, block)), name}, nil
	}}
	clear(s.disk[:4096])
	s.mustBackUp()
	s.wantPoints()
	s.wantTidy(1)
}

// A chain of files that does not hold together ends the backup, by the name of
// the file that is wrong; nothing is left, and the next works.
func TestBrokenChains(t *testing.T) {
	if testing.Short() {
		t.Skip("waits for many jobs")
	}
	s := newSite(t)
	s.write(0, "the first")
	s.mustBackUp()
	// A checkpoint of the user's: the disk has a parent now.
	for _, i := range s.host.Instances(cim.Virtualization, classSystem) {
		if i.Get("ElementName").String() != s.name {
			continue
		}
		service := s.host.Instances(cim.Virtualization, classSnapshots)[0]
		m, _ := service.Class.Method("CreateSnapshot")
		_, code, err := s.host.Invoke(t.Context(), service, m, map[string]cim.Value{"AffectedSystem": cim.To(i.Ref()), "SnapshotType": cim.Text("2")})
		if err != nil || code != returnStarted {
			t.Fatalf("the user's checkpoint: %d, %v", code, err)
		}
	}
	for before := s.left().files; len(before) == 0; before = s.left().files {
		if t.Context().Err() != nil {
			t.Fatal("the user's checkpoint is not made")
		}
		time.Sleep(time.Millisecond)
	}
	users := fmt.Sprint(s.left().files)
	s.write(1<<20, "the second")
	base, top := "", ""
	is := func(name string) (parent bool) {
		if strings.HasSuffix(name, ".avhdx") {
			top = name
			return false
		}
		base = name
		return true
	}
	for _, c := range []struct {
		name   string
		change func(name string) (image.File, error)
		class  error
		text   string
	}{
		{"missing", func(name string) (image.File, error) {
			if is(name) {
				return nil, fmt.Errorf("%s: %w", name, fault.ErrNotFound)
			}
			return nil, nil
		}, fault.ErrNotFound, "-0.vhdx"},
		{"its own parent", func(name string) (image.File, error) {
			if !is(name) {
				return nil, nil
			}
			f, err := simFiles{s.host}.open(t.Context(), top)
			if err != nil {
				return nil, err
			}
			return inMemory(top, f)
		}, fault.ErrCorrupt, "is in the chain already"},
		{"written to since", func(name string) (image.File, error) {
			if !is(name) {
				return nil, nil
			}
			f, err := simFiles{s.host}.open(t.Context(), base)
			if err != nil {
				return nil, err
			}
			m, err := inMemory(base, f)
			if err != nil {
				return nil, err
			}
			p, _ := io.ReadAll(m)
			for _, at := range []int64{64 << 10, 128 << 10} {
				h := p[at : at+4096]
				h[40] ^= 1 // its DataWriteGuid
				binary.LittleEndian.PutUint32(h[4:], 0)
				binary.LittleEndian.PutUint32(h[4:], crc32.Checksum(h, crc32.MakeTable(crc32.Castagnoli)))
			}
			return &memory{bytes.NewReader(p), base}, nil
		}, nil, "-0.vhdx"},
	} {
		s.files = odd{simFiles{s.host}, c.change}
		res := s.backUp(nil)
		var disk *DiskError
		switch {
		case res.Err == nil:
			t.Errorf("%s: the backup says that all is well", c.name)
		case !errors.As(res.Err, &disk), c.class != nil && !errors.Is(res.Err, c.class), !strings.Contains(res.Err.Error(), c.text), !strings.Contains(res.Err.Error(), s.name):
			t.Errorf("%s: %v", c.name, res.Err)
		}
		if l := s.left(); len(l.checkpoints) > 0 || len(l.references) != 1 || fmt.Sprint(l.files) != users {
			t.Errorf("%s: the host has %+v, want one reference point and %s", c.name, l, users)
		}
	}
	s.files = nil
	s.mustBackUp()
	s.wantPoints()
}
