package ova

import (
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"path"
	"strconv"
	"strings"

	"github.com/backstay/backstay/internal/extent"
	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/image"
)

// A Disk is one disk of an appliance.
type Disk struct {
	image.Image
	archive image.File
	base    int64 // where the image lies in the archive
	info    image.Info
}

// Open opens a disk of the appliance in f: the only one, or the one that which
// names by its number from 1, its ID or its file. The member with the disk
// goes to open, which allows it no further files. The Disk owns f; if Open
// fails, f is the caller's as before.
//
// The manifest's checksum of the disk is not computed: that would read all of
// it before the first byte. Formats with checksums of their own check those.
func Open(f image.File, which string, open func(f image.File, format image.Format) (image.Image, error)) (*Disk, error) {
	members, err := list(f)
	if err != nil {
		return nil, err
	}
	e, err := descriptorOf(f, members)
	if err != nil {
		return nil, err
	}
	chosen, err := choose(e.Disks, which)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", f.Name(), err)
	}
	m, err := memberOf(f, members, chosen)
	if err != nil {
		return nil, err
	}
	format, err := chosen.format()
	if err != nil {
		return nil, fmt.Errorf("%s: %w", f.Name(), err)
	}
	img, err := open(section{io.NewSectionReader(f, m.off, m.bytes), f.Name() + ": " + m.name}, format)
	if err != nil {
		return nil, err
	}
	d := &Disk{Image: img, archive: f, base: m.off}
	d.describe(e, chosen, m)
	return d, nil
}

// descriptorOf reads the first OVF descriptor of the archive.
func descriptorOf(f image.File, members []member) (envelope, error) {
	for _, m := range members {
		if !strings.EqualFold(path.Ext(m.name), descriptorName) || m.bytes < 0 {
			continue
		}
		name := f.Name() + ": " + m.name
		if m.bytes > maxDescriptor || m.sparse {
			return envelope{}, fault.Corrupt(name, -1, "a descriptor of %d bytes", m.bytes)
		}
		text := make([]byte, m.bytes)
		if n, err := f.ReadAt(text, m.off); n < len(text) {
			return envelope{}, fmt.Errorf("%s: %w", name, err)
		}
		return parseEnvelope(name, text)
	}
	return envelope{}, fault.Corrupt(f.Name(), -1, "no appliance: the archive has no OVF descriptor")
}

// choose finds the disk that is meant.
func choose(disks []diskElement, which string) (diskElement, error) {
	if which == "" && len(disks) == 1 {
		return disks[0], nil
	}
	if len(disks) == 0 {
		return diskElement{}, fmt.Errorf("an appliance without a disk: %w", fault.ErrNotFound)
	}
	var names []string
	for i, d := range disks {
		if which != "" && (which == d.ID || which == d.file.Href) {
			return d, nil
		}
		names = append(names, fmt.Sprintf("%d (%s)", i+1, d.file.Href))
	}
	if n, err := strconv.Atoi(which); err == nil && n >= 1 && n <= len(disks) {
		return disks[n-1], nil
	}
	if which != "" {
		return diskElement{}, fmt.Errorf("no disk %q: %w: %s", which, ErrWhichDisk, strings.Join(names, ", "))
	}
	return diskElement{}, fmt.Errorf("%d disks: %w: %s", len(disks), ErrWhichDisk, strings.Join(names, ", "))
}

// memberOf finds the file of a disk in the archive.
func memberOf(f image.File, members []member, d diskElement) (member, error) {
	no := func(why string) (member, error) {
		return member{}, fmt.Errorf("%s: disk %s: %s: %w", f.Name(), d.file.Href, why, fault.ErrUnsupported)
	}
	switch {
	case d.file.Compression != "" && !strings.EqualFold(d.file.Compression, "identity"):
		return no("compressed by " + d.file.Compression)
	case d.file.ChunkSize != "" && d.file.ChunkSize != "0":
		return no("in several pieces")
	case d.Parent != "":
		return no("a layer over another disk of the appliance")
	case strings.Contains(d.file.Href, "://"):
		return member{}, fmt.Errorf("%s: disk %q: %w", f.Name(), d.file.Href, image.ErrNotAllowed)
	}
	m, ok := find(members, d.file.Href)
	if !ok {
		return member{}, fault.Corrupt(f.Name(), -1, "the archive lacks %q, which its descriptor refers to", d.file.Href)
	}
	if m.sparse {
		return no("tar left its holes out")
	}
	return m, nil
}

// describe makes the Info.
func (d *Disk) describe(e envelope, chosen diskElement, m member) {
	info := d.Image.Info()
	if bytes, ok := chosen.bytes(); ok && bytes != info.VirtualBytes {
		info.Warnings = append(info.Warnings, fmt.Sprintf("the appliance's descriptor says that the disk has %d bytes", bytes))
	}
	details := map[string]string{"disk": m.name}
	for key, v := range info.FormatDetails {
		details[key] = v
	}
	if len(e.Systems) > 0 {
		if s := e.Systems[0]; s.Name != "" {
			details["system"] = s.Name
		} else if s.ID != "" {
			details["system"] = s.ID
		}
	}
	if n := len(e.Disks); n > 1 {
		details["disks"] = strconv.Itoa(n)
	}
	info.Variant = strings.TrimSpace(string(info.Format) + " " + info.Variant)
	info.Format = image.OVA
	info.FileBytes = d.archive.Bytes()
	info.FormatDetails = details
	d.info = info
}

// Info is that of the image in the archive, with what the descriptor says.
func (d *Disk) Info() image.Info { return d.info }

// Unwrap is the image in the archive, with what only its format can do.
func (d *Disk) Unwrap() image.Image { return d.Image }

// Extents are those of the image, whose bytes lie in the archive.
func (d *Disk) Extents(ctx context.Context, within extent.Extent) iter.Seq2[image.Extent, error] {
	return func(yield func(image.Extent, error) bool) {
		for e, err := range d.Image.Extents(ctx, within) {
			if e.FileOffset >= 0 {
				e.FileOffset += d.base
			}
			if !yield(e, err) {
				return
			}
		}
	}
}

// Close closes the archive.
func (d *Disk) Close() error { return errors.Join(d.Image.Close(), d.archive.Close()) }
