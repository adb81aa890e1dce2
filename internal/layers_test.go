package internal_test

import (
	"go/parser"
	"go/token"
	"io/fs"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// layers is the floor plan, top to bottom. A package may import from lines
// above its own. Names on one line are strangers. A name covers the packages
// below it: blob/s3 belongs to "blob", may import blob, and not the reverse.
//
// If this test fails, the plan is usually right and the import wrong.
var layers = []string{
	"extent chunk vm fault secret api winpath",
	"point",
	"retention blob image nbd wsman smb volume lab keycommand",
	"hypervisor guestfs reposerver",
	"repo",
	"vdisk backup",
	"restore verify mount",
	"policy catalog proxy",
	"job",
	"config console client demo",
	"server",
	"cli",
}

// It reads the files itself rather than asking "go list", so that files for
// every system count and "go test" knows when its cached answer is stale.
func TestImportsPointUp(t *testing.T) {
	const root = "github.com/backstay/backstay/internal/"
	place := func(pkg string) (name string, layer int) {
		name, _, _ = strings.Cut(pkg, "/")
		return name, slices.IndexFunc(layers, func(l string) bool {
			return slices.Contains(strings.Fields(l), name)
		})
	}
	err := filepath.WalkDir(".", func(file string, d fs.DirEntry, err error) error {
		if err == nil && d.Name() == "testdata" {
			return filepath.SkipDir
		}
		if err != nil || !strings.HasSuffix(file, ".go") || strings.HasSuffix(file, "_test.go") {
			return err // tests may import what they like
		}
		f, err := parser.ParseFile(token.NewFileSet(), file, nil, parser.ImportsOnly)
		if err != nil {
			return err
		}
		pkg := path.Dir(filepath.ToSlash(file))
		from, fromLayer := place(pkg)
		if fromLayer < 0 {
			t.Errorf("%s: package %s has no place in the floor plan", file, pkg)
		}
		for _, spec := range f.Imports {
			imp, _ := strconv.Unquote(spec.Path.Value)
			imp, ours := strings.CutPrefix(imp, root)
			to, toLayer := place(imp)
			switch {
			case !ours:
			case to != from && toLayer >= fromLayer:
				t.Errorf("%s imports %s, which is not above %s", file, imp, from)
			case strings.HasPrefix(imp, pkg+"/") && !strings.HasPrefix(imp, pkg+"/internal/"):
				t.Errorf("%s imports its own child %s", file, imp)
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}
