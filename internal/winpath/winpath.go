// Package winpath takes apart the file names of Windows that hosts and images
// give. It never asks the system it runs on: the names are another machine's.
//
// What it lets pass names one plain file or directory and no other: no
// device, no stream, nothing that Windows would spell another way when it
// opens it, no way up and out.
package winpath

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"unicode/utf16"
	"unicode/utf8"
)

// ErrName is the class of names that Parse and Join refuse.
var ErrName = errors.New("not the name of a file")

// What NTFS takes: units of UTF-16 in a name, and in a part of it.
const (
	maxPath = 32767
	maxPart = 255
)

// A Path is the full name of a file or directory: "C:\vm\disk.vhdx",
// "\\server\share\disk.vhdx". The zero Path names nothing.
type Path struct {
	root  string // "C:", "\\server\share", "\\?\Volume{…}"
	parts []string
}

// Parse takes a full name apart. Both slashes part it, and of several in a row
// all but one are dropped; the prefixes "\\?\" and "\\?\UNC\" mean nothing
// further. Parts that are "." or ".." are refused: a full name needs none.
func Parse(name string) (Path, error) {
	bad := func(why string) (Path, error) { return Path{}, refuse(name, why) }
	if !utf8.ValidString(name) {
		return bad("not valid text")
	}
	if len(utf16.Encode([]rune(name))) > maxPath {
		return Path{}, fmt.Errorf("a name of %d bytes: %w", len(name), ErrName)
	}
	s := strings.ReplaceAll(name, "/", `\`)
	var root string
	if rest, long := strings.CutPrefix(s, `\\?\`); long {
		s = rest
		if fold(s, `UNC\`) {
			s = `\\` + s[4:]
		} else if fold(s, "Volume{") {
			root, s, _ = strings.Cut(s, `\`)
			if !volume(root) {
				return bad("no volume's name")
			}
			root = `\\?\` + root
		}
	} else if strings.HasPrefix(s, `\\.`) {
		return bad("it names a device")
	}
	switch {
	case root != "":
	case len(s) >= 3 && letter(s[0]) && s[1] == ':' && s[2] == '\\':
		root, s = s[:2], s[3:]
	case len(s) == 2 && letter(s[0]) && s[1] == ':':
		return bad("a drive without a directory")
	case strings.HasPrefix(s, `\\`):
		server, rest, ok := strings.Cut(s[2:], `\`)
		share, below, _ := strings.Cut(rest, `\`)
		if !ok || server == "" || share == "" {
			return bad("a server without a share")
		}
		for _, p := range []string{server, share} {
			if why := wrong(p); why != "" {
				return bad(why)
			}
		}
		if strings.EqualFold(share, "IPC$") {
			return bad("a share that holds no files")
		}
		root, s = `\\`+server+`\`+share, below
	default:
		return bad("it does not begin with a drive or a server")
	}
	p := Path{root: root}
	for part := range strings.SplitSeq(s, `\`) {
		if part == "" {
			continue
		}
		if why := wrong(part); why != "" {
			return bad(why)
		}
		p.parts = append(p.parts, part)
	}
	return p, nil
}

// Full says whether name claims to be a full one, so that Parse and not Join
// is for it.
func Full(name string) bool {
	return len(name) > 1 && name[1] == ':' && letter(name[0]) || len(name) > 1 && slash(name[0]) && slash(name[1])
}

// Join is what the relative name leads to from the directory p. "." and ".."
// are followed; a way above p's drive or share is refused, as is a name that
// is not relative.
func (p Path) Join(name string) (Path, error) {
	if p.root == "" {
		return Path{}, refuse(name, "a relative name without a directory")
	}
	if !utf8.ValidString(name) || len(name) > 3*maxPath {
		return Path{}, fmt.Errorf("a relative name of %d bytes: %w", len(name), ErrName)
	}
	if Full(name) || name != "" && slash(name[0]) {
		return Path{}, refuse(name, "not relative")
	}
	q := Path{p.root, slices.Clone(p.parts)}
	for part := range strings.SplitSeq(strings.ReplaceAll(name, "/", `\`), `\`) {
		switch part {
		case "", ".":
			continue
		case "..":
			if len(q.parts) == 0 {
				return Path{}, refuse(name, "it leads out of "+p.root)
			}
			q.parts = q.parts[:len(q.parts)-1]
			continue
		}
		if why := wrong(part); why != "" {
			return Path{}, refuse(name, why)
		}
		q.parts = append(q.parts, part)
	}
	if len(utf16.Encode([]rune(q.String()))) > maxPath {
		return Path{}, fmt.Errorf("a name of %d bytes: %w", len(q.String()), ErrName)
	}
	return q, nil
}

// String is the path as Windows shows it.
func (p Path) String() string {
	if p.root == "" {
		return ""
	}
	return p.root + `\` + strings.Join(p.parts, `\`)
}

// Root is what the path begins at: "C:", "\\server\share" or a volume.
func (p Path) Root() string { return p.root }

// Below is the path without its root, empty for the root itself.
func (p Path) Below() string { return strings.Join(p.parts, `\`) }

// Base is the last part, empty for a root.
func (p Path) Base() string {
	if len(p.parts) == 0 {
		return ""
	}
	return p.parts[len(p.parts)-1]
}

// Dir is the directory that p lies in; a root lies in itself.
func (p Path) Dir() Path {
	return Path{p.root, p.parts[:max(len(p.parts)-1, 0)]}
}

// Drive is the drive's letter as a capital, and false where there is none.
func (p Path) Drive() (string, bool) {
	if len(p.root) != 2 {
		return "", false
	}
	return strings.ToUpper(p.root[:1]), true
}

// Share is which share of which server the path begins at, and false where it
// begins elsewhere.
func (p Path) Share() (server, share string, ok bool) {
	if !strings.HasPrefix(p.root, `\\`) || strings.HasPrefix(p.root, `\\?\`) {
		return "", "", false
	}
	server, share, _ = strings.Cut(p.root[2:], `\`)
	return server, share, true
}

// Under gives the way from dir to p, empty for dir itself, and false where p
// lies elsewhere. Case does not matter, as on Windows.
func (p Path) Under(dir Path) (rest string, ok bool) {
	if dir.root == "" || !strings.EqualFold(p.root, dir.root) || len(p.parts) < len(dir.parts) {
		return "", false
	}
	for i, part := range dir.parts {
		if !strings.EqualFold(part, p.parts[i]) {
			return "", false
		}
	}
	return strings.Join(p.parts[len(dir.parts):], `\`), true
}

// devices are the names that Windows takes for devices in every directory,
// whatever extension follows.
var devices = []string{"CON", "PRN", "AUX", "NUL", "CONIN$", "CONOUT$", "CLOCK$"}

// wrong says why part may not stand in a path, or nothing.
func wrong(part string) string {
	switch {
	case part == "." || part == "..":
		return "it leads upwards"
	case strings.ContainsRune(part, ':'):
		return "it names a stream or a drive"
	case strings.IndexFunc(part, func(r rune) bool { return r < 0x20 || r == 0x7f }) >= 0:
		return "it has a control character"
	case strings.ContainsAny(part, `<>"|?*\/`):
		return "it has a character that no file's name has"
	case strings.HasSuffix(part, " ") || strings.HasSuffix(part, "."):
		return "it ends with a space or a dot, which Windows drops"
	case len(utf16.Encode([]rune(part))) > maxPart:
		return "a part of it is too long"
	}
	stem, _, _ := strings.Cut(part, ".")
	stem = strings.ToUpper(strings.TrimRight(stem, " "))
	if slices.Contains(devices, stem) {
		return "it names a device"
	}
	if port, n := port(stem); port && slices.Contains([]string{"0", "1", "2", "3", "4", "5", "6", "7", "8", "9", "¹", "²", "³"}, n) {
		return "it names a device"
	}
	return ""
}

func port(stem string) (bool, string) {
	for _, kind := range []string{"COM", "LPT"} {
		if n, ok := strings.CutPrefix(stem, kind); ok {
			return true, n
		}
	}
	return false, ""
}

// volume says whether s is Volume{…} with a GUID.
func volume(s string) bool {
	guid, ok := strings.CutSuffix(s[len("Volume{"):], "}")
	if !ok || len(guid) != 36 {
		return false
	}
	for i, c := range []byte(guid) {
		hex := c >= '0' && c <= '9' || c|0x20 >= 'a' && c|0x20 <= 'f'
		if dash := i == 8 || i == 13 || i == 18 || i == 23; dash && c != '-' || !dash && !hex {
			return false
		}
	}
	return true
}

func letter(c byte) bool { return c|0x20 >= 'a' && c|0x20 <= 'z' }

func slash(c byte) bool { return c == '\\' || c == '/' }

// fold says whether s begins with prefix in any case.
func fold(s, prefix string) bool {
	return len(s) >= len(prefix) && strings.EqualFold(s[:len(prefix)], prefix)
}

func refuse(name, why string) error { return fmt.Errorf("%q: %w: %s", name, ErrName, why) }
