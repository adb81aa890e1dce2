package vmdk

import (
	"path/filepath"
	"regexp"
	"strings"
	"unicode/utf8"
)

// The characters of windows-1252 from 0x80 to 0x9f; the rest are Unicode's
// first. VMware calls western Windows systems so.
const upper1252 = "€\u0081‚ƒ„…†‡ˆ‰Š‹Œ\u008dŽ\u008f\u0090‘’“”•–—˜™š›œ\u009džŸ"

// spellings are the names that a file may have here which the descriptor calls
// name. A descriptor is in the code page of the system that wrote it, and its
// files got their names' characters on the way here, or kept their bytes.
func (d *descriptor) spellings(name string) []string {
	list := []string{name}
	if isASCII(name) {
		return list
	}
	switch strings.ToLower(d.fields["encoding"]) {
	case "windows-1252", "cp1252", "iso-8859-1", "iso-8859-15", "latin1":
		list = append(list, from1252(name))
	}
	return list
}

// extentSuffix is what VMware puts behind the name of the disk to name its
// extents.
var extentSuffix = regexp.MustCompile(`(?i)-(flat|delta|sesparse|[sf][0-9]{3,})\.vmdk$`)

// extentSpellings are the spellings of an extent of the descriptor file own.
// Where the name is in a code page that we do not know, it is what VMware
// would have called it: like the descriptor.
func (d *descriptor) extentSpellings(name, own string) []string {
	list := d.spellings(name)
	if suffix := extentSuffix.FindString(name); suffix != "" && !utf8.ValidString(name) {
		base := filepath.Base(own)
		list = append(list, strings.TrimSuffix(base, filepath.Ext(base))+suffix)
	}
	return list
}

func from1252(s string) string {
	var b strings.Builder
	high := []rune(upper1252)
	for _, c := range []byte(s) {
		if c >= 0x80 && c < 0xa0 {
			b.WriteRune(high[c-0x80])
		} else {
			b.WriteRune(rune(c))
		}
	}
	return b.String()
}

func isASCII(s string) bool {
	for _, c := range []byte(s) {
		if c >= 0x80 {
			return false
		}
	}
	return true
}
