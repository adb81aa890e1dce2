// Package ova reads and writes virtual appliances: a tar of an OVF descriptor,
// a manifest of checksums and the disks. It is how VMware's and other people's
// tools hand a machine from one to the other.
//
// A disk is read where it lies in the archive; nothing is unpacked.
package ova

import (
	"archive/tar"
	"errors"
	"fmt"
	"io"
	"net/url"
	"path"
	"strings"

	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/image"
)

// ErrWhichDisk says that an appliance has several disks, or none of the name
// that was asked for; its text lists them.
var ErrWhichDisk = errors.New("one of the appliance's disks must be named")

const (
	block          = 512 // of a tar
	maxMembers     = 1000
	maxNameBytes   = 1024
	maxDescriptor  = 4 << 20
	descriptorName = ".ovf"
)

// Probe says whether f begins like an appliance: a tar whose first member is
// an OVF descriptor.
func Probe(f image.File) bool {
	var b [block]byte
	if n, _ := f.ReadAt(b[:], 0); n < block || string(b[257:262]) != "ustar" {
		return false
	}
	name, _, _ := strings.Cut(string(b[:100]), "\x00")
	return strings.EqualFold(path.Ext(name), descriptorName)
}

// A member is a file in the archive.
type member struct {
	name   string
	off    int64
	bytes  int64
	sparse bool // tar keeps its holes away: its bytes are not in one piece
}

// list walks the archive's headers.
func list(f image.File) ([]member, error) {
	r := io.NewSectionReader(f, 0, f.Bytes())
	t := tar.NewReader(r)
	var members []member
	for {
		h, err := t.Next()
		if err == io.EOF {
			return members, nil
		}
		at, seekErr := r.Seek(0, io.SeekCurrent)
		if seekErr != nil {
			return nil, seekErr
		}
		switch {
		case errors.Is(err, io.ErrUnexpectedEOF):
			return nil, fault.Corrupt(f.Name(), at, "the archive is truncated")
		case err != nil:
			return nil, fault.Corrupt(f.Name(), at, "no header of a tar archive: %w", err)
		case h.Typeflag == tar.TypeDir:
			continue
		case len(members) == maxMembers || len(h.Name) > maxNameBytes:
			return nil, fmt.Errorf("%s: an archive of more than %d files or with names of more than %d bytes: %w", f.Name(), maxMembers, maxNameBytes, fault.ErrUnsupported)
		}
		m := member{name: path.Clean(h.Name), off: at, bytes: h.Size, sparse: h.Typeflag == tar.TypeGNUSparse}
		for key := range h.PAXRecords {
			m.sparse = m.sparse || strings.HasPrefix(key, "GNU.sparse.")
		}
		if !m.sparse && m.bytes > f.Bytes()-m.off {
			return nil, fault.Corrupt(f.Name(), m.off, "the archive is truncated: %q has %d bytes, and it ends at %d", m.name, m.bytes, f.Bytes())
		}
		if h.Typeflag != tar.TypeReg && !m.sparse {
			m.bytes = -1 // a link or a device is not the file it is called
		}
		members = append(members, m)
	}
}

// find looks for the file that a descriptor refers to.
func find(members []member, href string) (member, bool) {
	names := []string{path.Clean(href)}
	if plain, err := url.PathUnescape(href); err == nil {
		names = append(names, path.Clean(plain))
	}
	for _, name := range names {
		for _, m := range members {
			if m.name == name && m.bytes >= 0 {
				return m, true
			}
		}
	}
	return member{}, false
}

// A section is a member as the file that an image is read from.
type section struct {
	*io.SectionReader
	name string
}

func (s section) Bytes() int64 { return s.Size() }
func (s section) Name() string { return s.name }
func (s section) Close() error { return nil } // the archive is the appliance's
