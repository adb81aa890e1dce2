package vmdk

import (
	"bytes"
	"fmt"
	"maps"
	"math"
	"slices"
	"strconv"
	"strings"

	"github.com/backstay/backstay/internal/fault"
)

const (
	sector = 512

	// Descriptors of strangers are text of any length. A disk of 62 TiB in
	// pieces of 2 GB, the largest there can be, takes 2 MB and 31,744 extents.
	maxDescriptorBytes = 4 << 20
	maxExtents         = 1 << 15
	maxFields          = 4096

	// No disk is larger than this many bytes, so that sums of a few sizes
	// cannot overflow.
	maxBytes = 1 << 56

	noParent = 0xffffffff // parentCID of a disk without a parent
)

// A descriptor is the text that says what a VMDK consists of.
type descriptor struct {
	createType string
	cid        uint32
	parentCID  uint32
	parentHint string
	extents    []extentLine
	// fields are all "key = value" lines by lower-case key, ddb ones too.
	fields map[string]string
}

// An extentLine is one line of the descriptor's extent list.
type extentLine struct {
	access string // "RW", "RDONLY", "NOACCESS"
	bytes  int64
	kind   string // "FLAT", "SPARSE", …, upper case
	name   string // empty for ZERO
	offset int64  // bytes into the file, FLAT only
}

// parseDescriptor reads a descriptor of which object is the name in messages.
// It takes any spelling that VMware's and other people's programs were seen to
// write (CRLF, blanks around "=", trailing blanks, NUL padding, any case of
// the keys) and refuses what has two meanings.
func parseDescriptor(object string, text []byte) (*descriptor, error) {
	if i := bytes.IndexByte(text, 0); i >= 0 {
		text = text[:i]
	}
	text = bytes.TrimPrefix(text, []byte("\xef\xbb\xbf"))
	d := &descriptor{parentCID: noParent, fields: map[string]string{}}
	var total int64
	for n := 1; len(text) > 0; n++ {
		var raw []byte
		raw, text, _ = bytes.Cut(text, []byte("\n"))
		line := strings.TrimSpace(string(raw))
		if line == "" || line[0] == '#' {
			continue
		}
		bad := func(format string, args ...any) error {
			return fault.Corrupt(object, -1, "descriptor line %d: %w", n, fmt.Errorf(format, args...))
		}
		word, rest := field(line)
		switch access := strings.ToUpper(word); access {
		case "RW", "RDONLY", "NOACCESS":
			if len(d.extents) == maxExtents {
				return nil, bad("more than %d extents", maxExtents)
			}
			e, err := parseExtentLine(access, rest)
			if err != nil {
				return nil, bad("%w", err)
			}
			if total += e.bytes; total > maxBytes {
				return nil, bad("the extents add up to more than %d bytes", int64(maxBytes))
			}
			d.extents = append(d.extents, e)
			continue
		}
		if likeExtent(rest) {
			return nil, bad("an extent with the access %q", word)
		}
		key, value, ok := strings.Cut(line, "=")
		if !ok {
			continue // VMware ignores what it does not know, and so must we
		}
		key, value = strings.ToLower(strings.TrimSpace(key)), unquote(value)
		if old, twice := d.fields[key]; twice && old != value {
			switch key {
			case "cid", "parentcid", "createtype", "parentfilenamehint":
				return nil, bad("a second, different %s", key)
			}
			continue
		}
		if len(d.fields) == maxFields {
			return nil, bad("more than %d settings", maxFields)
		}
		d.fields[key] = value
	}
	return d, d.finish(object)
}

// likeExtent says whether rest is what follows the access word of an extent.
// To pass over such a line would leave a piece out of the disk.
func likeExtent(rest string) bool {
	count, rest := field(rest)
	if _, err := strconv.ParseInt(count, 10, 64); err != nil {
		return false
	}
	kind, _ := field(rest)
	return slices.Contains(extentKinds, strings.ToUpper(kind))
}

// extentKinds are the types of extents that VMware's programs write.
var extentKinds = []string{"FLAT", "SPARSE", "ZERO", "VMFS", "VMFSSPARSE", "VMFSRDM", "VMFSRAW", "SESPARSE"}

// finish gives the fields that readers ask for their types.
func (d *descriptor) finish(object string) error {
	d.createType = d.fields["createtype"]
	d.parentHint = d.fields["parentfilenamehint"]
	for key, to := range map[string]*uint32{"cid": &d.cid, "parentcid": &d.parentCID} {
		text, ok := d.fields[key]
		if !ok {
			continue
		}
		v, err := strconv.ParseUint(strings.TrimPrefix(strings.ToLower(text), "0x"), 16, 32)
		if err != nil {
			return fault.Corrupt(object, -1, "descriptor: %s is %q, not 32 bits in hexadecimal", key, text)
		}
		*to = uint32(v)
	}
	if v, ok := d.fields["version"]; ok {
		n, err := strconv.Atoi(v)
		if err != nil || n < 1 {
			return fault.Corrupt(object, -1, "descriptor: version is %q", v)
		}
		if n > 4 {
			return fmt.Errorf("%s: descriptor version %d: %w", object, n, fault.ErrUnsupported)
		}
	}
	return nil
}

// parseExtentLine reads what follows the access word:
//
//	20480 FLAT "disk-flat.vmdk" 0
func parseExtentLine(access, rest string) (extentLine, error) {
	e := extentLine{access: access}
	count, rest := field(rest)
	sectors, err := strconv.ParseInt(count, 10, 64)
	if err != nil || sectors < 0 || sectors > maxBytes/sector {
		return e, fmt.Errorf("an extent of %q sectors", count)
	}
	e.bytes = sectors * sector
	e.kind, rest = field(rest)
	e.kind = strings.ToUpper(e.kind)
	if e.kind == "" {
		return e, fmt.Errorf("an extent of no type")
	}
	rest = strings.TrimSpace(rest)
	if rest == "" {
		return e, nil
	}
	if rest[0] == '"' {
		end := strings.IndexByte(rest[1:], '"')
		if end < 0 {
			return e, fmt.Errorf("a file name without a closing quote")
		}
		e.name, rest = rest[1:1+end], rest[end+2:]
	} else {
		e.name, rest = field(rest)
	}
	// What follows the offset names a partition or a device: not for us.
	if off, _ := field(rest); off != "" {
		v, err := strconv.ParseInt(off, 10, 64)
		if err != nil || v < 0 || v > math.MaxInt64/sector {
			return e, fmt.Errorf("an extent at offset %q", off)
		}
		e.offset = v * sector
	}
	return e, nil
}

// field cuts the first blank-separated word off s.
func field(s string) (word, rest string) {
	s = strings.TrimLeft(s, " \t")
	if i := strings.IndexAny(s, " \t"); i >= 0 {
		return s[:i], s[i:]
	}
	return s, ""
}

func unquote(s string) string {
	s = strings.TrimSpace(s)
	if len(s) >= 2 && s[0] == '"' && s[len(s)-1] == '"' {
		s = s[1 : len(s)-1]
	}
	return s
}

// parentUUID is what VirtualBox says of the parent, empty for none. It writes
// its layers without a CID or a file of the parent, so that they look whole.
func (d *descriptor) parentUUID() string {
	uuid := d.fields["ddb.uuid.parent"]
	if strings.Trim(uuid, "0-") == "" {
		return ""
	}
	return uuid
}

// refuse says why a disk that this descriptor describes cannot be read at all,
// however sound it is.
func (d *descriptor) refuse(object string) error {
	no := func(why string) error { return fmt.Errorf("%s: %s: %w", object, why, fault.ErrUnsupported) }
	for _, key := range slices.Sorted(maps.Keys(d.fields)) {
		if strings.Contains(key, "keysafe") || strings.HasPrefix(key, "encryption.") || key == "encryptionkeys" {
			return no("the disk is encrypted by VMware")
		}
	}
	if strings.Contains(strings.ToLower(d.fields["ddb.iofilters"]), "crypt") {
		return no("the disk is encrypted by VMware")
	}
	switch strings.ToLower(d.createType) {
	case "vmfsrawdevicemap", "vmfspassthroughrawdevicemap", "vmfsrdm", "vmfsrdmp", "vmfsraw":
		return no("a raw device mapping, whose data lie on a LUN and not in the file")
	case "fulldevice", "partitioneddevice", "2gbmaxextentdevice":
		return no("a VMDK over a physical device (" + d.createType + ")")
	}
	for _, e := range d.extents {
		switch {
		case e.access == "NOACCESS":
			return no("it has an extent marked NOACCESS")
		case e.kind == "VMFSRDM", e.kind == "VMFSRAW":
			return no("a raw device mapping, whose data lie on a LUN and not in the file")
		case strings.Contains(e.name, "://"): // vsan://, vvol://
			return no(fmt.Sprintf("its data lie in the object %q and not in a file", e.name))
		}
	}
	return nil
}
