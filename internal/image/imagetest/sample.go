package imagetest

import (
	"bufio"
	"bytes"
	"compress/bzip2"
	"compress/gzip"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/backstay/backstay/internal/chunk"
)

// Skip skips a test that needs what is not here, or fails it where
// BACKSTAY_MAY_NOT_SKIP is 1.
func Skip(t testing.TB, format string, args ...any) {
	t.Helper()
	if os.Getenv("BACKSTAY_MAY_NOT_SKIP") == "1" {
		t.Fatalf("may not skip: "+format, args...)
	}
	t.Skipf(format, args...)
}

// Tool is the path of an external program, without which t skips.
func Tool(t testing.TB, name string) string {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		Skip(t, "%s is not installed", name)
	}
	return path
}

// Samples is the folder of sample images that others made, without which t
// skips. "none" says on purpose that this machine has none: then t skips
// whatever BACKSTAY_MAY_NOT_SKIP says.
func Samples(t testing.TB) string {
	t.Helper()
	dir := os.Getenv("BACKSTAY_SAMPLES")
	if dir == "none" {
		t.Skip("BACKSTAY_SAMPLES says that there are no sample images")
	}
	if dir == "" {
		Skip(t, "BACKSTAY_SAMPLES does not say where the sample images are")
	}
	return dir
}

// A SampleInfo is a line of the samples' INDEX.md.
type SampleInfo struct {
	Name         string // "dfvfs/ext2.qcow2.gz"
	VirtualBytes string // decimal, or "-" where the image cannot be read
	SHA256       string // of the virtual disk, or "-"
	Features     string
}

// SampleList is what the samples' INDEX.md lists.
func SampleList(t testing.TB) []SampleInfo {
	t.Helper()
	p, err := os.ReadFile(filepath.Join(Samples(t), "INDEX.md"))
	if err != nil {
		t.Fatal(err)
	}
	var list []SampleInfo
	for s := bufio.NewScanner(bytes.NewReader(p)); s.Scan(); {
		cells := strings.Split(s.Text(), "|")
		if len(cells) < 10 || !strings.Contains(cells[1], "/") {
			continue
		}
		for i := range cells {
			cells[i] = strings.TrimSpace(cells[i])
		}
		list = append(list, SampleInfo{Name: cells[1], Features: cells[4], VirtualBytes: cells[7], SHA256: cells[8]})
	}
	if len(list) == 0 {
		t.Fatal("INDEX.md of the samples lists nothing")
	}
	return list
}

// Sample unpacks a sample into a directory of its own and gives its path and
// the SHA-256 of its virtual disk, "-" if there is none.
func Sample(t testing.TB, name string) (path, sha256 string) {
	t.Helper()
	return SampleIn(t, t.TempDir(), name)
}

// SampleIn is Sample into dir, where the parents are.
func SampleIn(t testing.TB, dir, name string) (path, sha256 string) {
	t.Helper()
	for _, s := range SampleList(t) {
		if s.Name == name {
			sha256 = s.SHA256
		}
	}
	if sha256 == "" {
		t.Fatalf("no sample %s in INDEX.md", name)
	}
	in, err := os.Open(filepath.Join(Samples(t), filepath.FromSlash(name)))
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	r, base := io.Reader(in), filepath.Base(name)
	switch filepath.Ext(base) {
	case ".gz":
		if r, err = gzip.NewReader(in); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		base = strings.TrimSuffix(base, ".gz")
	case ".bz2":
		r = bzip2.NewReader(in)
		base = strings.TrimSuffix(base, ".bz2")
	}
	path = filepath.Join(dir, base)
	if err := saveSparse(path, r); err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	return path, sha256
}

// saveSparse writes r to path with holes for its zeros: samples of 100 MiB
// are mostly that.
func saveSparse(path string, r io.Reader) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	defer f.Close()
	p := make([]byte, 64<<10)
	for off := int64(0); ; {
		n, err := io.ReadFull(r, p)
		if n > 0 && !chunk.IsZero(p[:n]) {
			if _, err := f.WriteAt(p[:n], off); err != nil {
				return err
			}
		}
		off += int64(n)
		switch err {
		case nil:
		case io.EOF, io.ErrUnexpectedEOF:
			return f.Truncate(off)
		default:
			return err
		}
	}
}
