package vmdk

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/backstay/backstay/internal/extent"
	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/image"
)

const headBytes = 1024

// Probe says whether f begins like a VMDK, or like an extent of one, which
// does not open alone.
func Probe(f image.File) bool {
	head := make([]byte, headBytes)
	n, _ := f.ReadAt(head, 0)
	head = head[:n]
	for _, magic := range []string{magicSparse, magicCOWD, magicSESparse} {
		if bytes.HasPrefix(head, []byte(magic)) {
			return true
		}
	}
	return isDescriptor(head)
}

// isDescriptor says whether a file that begins with head is a descriptor. The
// first line is the same in all that were seen; case and blanks are not.
func isDescriptor(head []byte) bool {
	head = bytes.TrimLeft(bytes.TrimPrefix(head, []byte("\xef\xbb\xbf")), " \t\r\n")
	if !bytes.HasPrefix(head, []byte("#")) {
		return false
	}
	line, _, _ := bytes.Cut(head[1:], []byte("\n"))
	return strings.EqualFold(strings.Join(strings.Fields(string(line)), ""), "DiskDescriptorFile")
}

// readsLikeDescriptor is for a file that was called a VMDK and whose first
// line is somebody's own comment: the first setting tells.
func readsLikeDescriptor(head []byte) bool {
	for line := range bytes.Lines(head) {
		line = bytes.TrimSpace(bytes.TrimPrefix(line, []byte("\xef\xbb\xbf")))
		if len(line) == 0 || line[0] == '#' {
			continue
		}
		key, value, _ := bytes.Cut(line, []byte("="))
		value = bytes.TrimSpace(value)
		return bytes.EqualFold(bytes.TrimSpace(key), []byte("version")) && len(value) == 1 && value[0] >= '1' && value[0] <= '4'
	}
	return false
}

// Open opens the VMDK in f, a descriptor or a file that has one in it, whose
// extents come from o.Resolver. The Disk owns f and its parent; if Open fails,
// f is the caller's as before.
//
// Damage is of the class fault.ErrCorrupt, what cannot be read although it is
// sound (encrypted disks, mappings of raw devices) of fault.ErrUnsupported.
func Open(f image.File, o image.OpenOptions) (*Disk, error) {
	if o.Snapshot != "" {
		return nil, fmt.Errorf("%s: snapshot %q: VMDKs have no internal snapshots: %w", f.Name(), o.Snapshot, fault.ErrNotFound)
	}
	if o.Resolver == nil {
		o.Resolver = image.None
	}
	b := &builder{f: f, o: o, byName: map[string]image.File{}, sparse: map[string]*sparse{}}
	if err := b.open(); err != nil {
		var errs []error
		for _, file := range b.opened {
			errs = append(errs, file.Close())
		}
		return nil, errors.Join(append([]error{err}, errs...)...)
	}
	b.d.files = append([]image.File{f}, b.opened...)
	return &b.d, nil
}

// A builder is an Open under way.
type builder struct {
	f      image.File
	o      image.OpenOptions
	d      Disk
	desc   *descriptor
	byName map[string]image.File
	opened []image.File
	sparse map[string]*sparse // extents by kind and name
}

func (b *builder) open() error {
	head := make([]byte, min(headBytes, b.f.Bytes()))
	if err := readFull(b.f, head, 0); err != nil {
		return err
	}
	b.d.info = image.Info{Format: image.VMDK, SectorBytes: sector, FileBytes: b.f.Bytes()}
	var err error
	switch {
	case bytes.HasPrefix(head, []byte(magicSparse)):
		err = b.openMonolithic(head)
	case bytes.HasPrefix(head, []byte(magicCOWD)), bytes.HasPrefix(head, []byte(magicSESparse)):
		err = fmt.Errorf("%s: a data file of a VMDK; open the small descriptor file beside it: %w", b.f.Name(), fault.ErrUnsupported)
	case bytes.HasPrefix(head, []byte(magicTracking)):
		err = trackingMap(b.f.Name(), head)
	case isDescriptor(head), readsLikeDescriptor(head):
		err = b.openDescriptor()
	default:
		err = fault.Corrupt(b.f.Name(), 0, "no VMDK begins like this (a -flat file is opened through the descriptor beside it)")
	}
	if err != nil {
		return err
	}
	b.describe()
	switch hint := b.desc.parentHint; {
	case b.desc.parentUUID() != "" && hint == "" && !b.o.OnlyTop:
		return fmt.Errorf("%s: a VirtualBox layer over the disk with the UUID %s, whose file only VirtualBox knows: %w", b.f.Name(), b.desc.parentUUID(), fault.ErrUnsupported)
	case b.desc.parentCID != noParent && !b.o.OnlyTop:
		return b.openParent()
	case b.desc.parentCID == noParent && hint != "" && b.desc.fields["parentcid"] == "":
		return fault.Corrupt(b.f.Name(), -1, "its descriptor names the parent %q and not the parent's CID", hint)
	case b.desc.parentCID == noParent && hint != "":
		b.warn("its descriptor names %q, yet says that there is no parent: read as a whole disk", hint)
	}
	return nil
}

// openMonolithic opens a sparse extent that holds its own descriptor. The
// extent that the descriptor names is this file, whatever it calls it.
func (b *builder) openMonolithic(head []byte) error {
	name := b.f.Name()
	h, err := parseHeader(name, 0, head)
	if err != nil {
		return err
	}
	if h.descOffset == 0 || h.descBytes == 0 {
		return fmt.Errorf("%s: one extent of a split VMDK; open the descriptor beside it: %w", name, fault.ErrUnsupported)
	}
	if h.descBytes > maxDescriptorBytes {
		return fault.Corrupt(name, 36, "a descriptor of %d bytes", h.descBytes)
	}
	text := make([]byte, h.descBytes)
	if err := readFull(b.f, text, h.descOffset); err != nil {
		return err
	}
	if b.desc, err = parseDescriptor(name, text); err != nil {
		return err
	}
	if err := b.desc.refuse(name); err != nil {
		return err
	}
	if h.capacity == 0 && len(b.desc.extents) > 0 && b.desc.extents[0].bytes > 0 {
		return b.addExtents() // a descriptor with a header before it
	}
	s, err := b.openSparse(b.f, h)
	if err != nil {
		return err
	}
	s.ready(1)
	if len(b.desc.fields) == 0 {
		b.warn("its descriptor is empty: if it is one extent of a split disk, the rest is in other files")
	}
	if n := len(b.desc.extents); n > 1 {
		return fault.Corrupt(name, h.descOffset, "%d extents in a descriptor that lies in the only one", n)
	}
	if len(b.desc.extents) == 1 && b.desc.extents[0].bytes != h.capacity {
		b.warn("the descriptor says %d bytes, the header %d; the header counts", b.desc.extents[0].bytes, h.capacity)
	}
	b.add(h.capacity, s)
	return nil
}

// openDescriptor opens a descriptor that is a file of its own.
func (b *builder) openDescriptor() error {
	name := b.f.Name()
	if b.f.Bytes() > maxDescriptorBytes {
		return fault.Corrupt(name, -1, "a descriptor of %d bytes", b.f.Bytes())
	}
	text := make([]byte, b.f.Bytes())
	err := readFull(b.f, text, 0)
	if err != nil {
		return err
	}
	if b.desc, err = parseDescriptor(name, text); err != nil {
		return err
	}
	if err := b.desc.refuse(name); err != nil {
		return err
	}
	return b.addExtents()
}

// addExtents opens what the descriptor lists.
func (b *builder) addExtents() error {
	name := b.f.Name()
	if len(b.desc.extents) == 0 {
		return fault.Corrupt(name, -1, "its descriptor lists no extents")
	}
	for _, e := range b.desc.extents {
		if e.kind == "ZERO" {
			b.add(e.bytes, blank{})
			continue
		}
		if !slices.Contains(extentKinds, e.kind) {
			return fmt.Errorf("%s: an extent of type %q: %w", name, e.kind, fault.ErrUnsupported)
		}
		if e.name == "" {
			return fault.Corrupt(name, -1, "its descriptor has a %s extent without a file", e.kind)
		}
		f, err := b.resolve(e.name)
		if err != nil {
			return fmt.Errorf("%s: extent %q: %w", name, e.name, err)
		}
		l, err := b.openExtent(f, e)
		if err != nil {
			return err
		}
		b.add(e.bytes, l)
	}
	return nil
}

// resolve opens a file once, however many extents lie in it.
func (b *builder) resolve(name string) (image.File, error) {
	if f, ok := b.byName[name]; ok {
		return f, nil
	}
	var f image.File
	var err error
	for _, spelling := range b.desc.extentSpellings(name, b.f.Name()) {
		var again error
		if f, again = b.o.Resolver.Resolve(spelling); again == nil {
			err = nil
			break
		}
		err = cmp.Or(err, again) // the name as it stands says most
	}
	if err != nil {
		return nil, err
	}
	b.byName[name] = f
	b.opened = append(b.opened, f)
	b.d.info.FileBytes += f.Bytes()
	return f, nil
}

// openExtent makes the layer of one line of a descriptor file.
func (b *builder) openExtent(f image.File, e extentLine) (layer, error) {
	if e.kind == "FLAT" || e.kind == "VMFS" {
		return newFlat(f, e)
	}
	key := e.kind + " " + e.name
	s := b.sparse[key]
	if s == nil {
		var err error
		if s, err = b.openSparseExtent(f, e.kind); err != nil {
			return nil, err
		}
		s.ready(len(b.desc.extents))
		b.sparse[key] = s
	}
	if s.capacity < e.bytes {
		return nil, fault.Corrupt(f.Name(), -1, "an extent of %d bytes, and the descriptor says %d", s.capacity, e.bytes)
	}
	if b.d.info.BlockBytes == 0 {
		b.d.info.BlockBytes = s.grain
	}
	return s, nil
}

// openSparseExtent makes the layer of a file that holds an extent of that
// kind. A descriptor that names it a thousand times makes it once.
func (b *builder) openSparseExtent(f image.File, kind string) (s *sparse, err error) {
	switch kind {
	case "SESPARSE":
		s, err = openSESparse(f)
	case "SPARSE", "VMFSSPARSE":
		head := make([]byte, min(headerBytes, f.Bytes()))
		if err := readFull(f, head, 0); err != nil {
			return nil, err
		}
		if bytes.HasPrefix(head, []byte(magicCOWD)) {
			s, err = openCOWD(f)
			break
		}
		var h header
		if h, err = parseHeader(f.Name(), 0, head); err == nil {
			s, err = b.openSparse(f, h)
		}
	default:
		err = fmt.Errorf("%s: an extent of type %q: %w", b.f.Name(), kind, fault.ErrUnsupported)
	}
	return s, err
}

// openSparse makes a layer of a hosted sparse extent.
func (b *builder) openSparse(f image.File, h header) (s *sparse, err error) {
	if h.overhead > f.Bytes() {
		return nil, fault.Corrupt(f.Name(), -1, "the file is truncated: its data begin at %d, and it ends at %d", h.overhead, f.Bytes())
	}
	if h.gdOffset == -1 || h.gdOffset == 0 && h.markers() {
		s, err = openStream(f, h)
	} else {
		s, err = openHosted(f, h)
	}
	if err != nil {
		return nil, err
	}
	info := &b.d.info
	info.Version, info.BlockBytes = int(h.version), h.grain
	if h.compressed() {
		info.Compression = "zlib"
	}
	if h.unclean {
		b.warn("%s was not closed cleanly by its last writer", f.Name())
	}
	return s, nil
}

func (b *builder) add(bytes int64, l layer) {
	if bytes == 0 {
		return
	}
	b.d.parts = append(b.d.parts, part{extent.Extent{Off: b.d.size, Len: bytes}, l})
	b.d.size += bytes
}

func (b *builder) warn(format string, args ...any) {
	b.d.info.Warnings = append(b.d.info.Warnings, fmt.Sprintf(format, args...))
}

// describe fills in Info what the descriptor says.
func (b *builder) describe() {
	info, d := &b.d.info, b.desc
	info.VirtualBytes = b.d.size
	info.Variant = d.createType
	info.Identity = cidText(d.cid)
	if d.parentCID != noParent {
		info.Parent, info.ParentFormat = d.parentHint, image.VMDK
	}
	if uuid := d.parentUUID(); uuid != "" && info.Parent == "" {
		info.Parent = uuid
	}
	info.FormatDetails = map[string]string{}
	if d.parentCID != noParent {
		info.FormatDetails["parent identity"] = cidText(d.parentCID)
	}
	for label, key := range map[string]string{
		"adapter": "ddb.adaptertype", "hardware version": "ddb.virtualhwversion",
		"content id": "ddb.longcontentid", "uuid": "ddb.uuid", "change tracking file": "changetrackpath",
	} {
		if v := d.fields[key]; v != "" {
			info.FormatDetails[label] = v
		}
	}
	if c, h, s := d.fields["ddb.geometry.cylinders"], d.fields["ddb.geometry.heads"], d.fields["ddb.geometry.sectors"]; c != "" && h != "" && s != "" {
		info.FormatDetails["geometry"] = c + "/" + h + "/" + s
	}
	if n := len(d.extents); n > 1 {
		info.FormatDetails["extents"] = fmt.Sprint(n)
	}
}

func cidText(cid uint32) string { return fmt.Sprintf("%08x", cid) }

// openParent opens the disk that this one is a snapshot of and makes sure that
// it is that disk, unchanged since.
func (b *builder) openParent() error {
	name, hint := b.f.Name(), b.desc.parentHint
	if hint == "" {
		return fault.Corrupt(name, -1, "a snapshot of a disk with CID %s, of which its descriptor does not say the file", cidText(b.desc.parentCID))
	}
	if b.o.Parent == nil {
		return fmt.Errorf("%s: parent %q: %w", name, hint, image.ErrNotAllowed)
	}
	var parent image.Image
	var err error
	for _, spelling := range b.desc.spellings(hint) {
		var again error
		if parent, again = b.o.Parent(spelling, image.VMDK); again == nil {
			err = nil
			break
		}
		err = cmp.Or(err, again)
	}
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	want, have := cidText(b.desc.parentCID), parent.Info()
	switch {
	case have.Format != image.VMDK:
		err = fault.Corrupt(name, -1, "its parent %q is a %s image", hint, have.Format)
	case have.Identity != want:
		err = fault.Corrupt(name, -1, "its parent %q has CID %s, and the snapshot is of one with CID %s: a wrong file, or written to since", hint, have.Identity, want)
	default:
		b.d.parent = parent
		return nil
	}
	return errors.Join(err, parent.Close())
}
