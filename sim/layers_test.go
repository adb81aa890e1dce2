package sim_test

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

// layers is the floor plan of the simulators, top to bottom, as
// internal/layers_test.go has that of Backstay.
var layers = []string{
	"hyperv/cim hyperv/ntlm",
	"hyperv/wsman",
	"hyperv/host",
	"hyperv",
}

// ours is what a simulator may use of Backstay: what makes disks. A client that
// shared code with its simulator would share its mistakes.
var ours = []string{"extent", "image", "image/vhd", "image/vhdx"}

func TestImportsPointUp(t *testing.T) {
	const root = "github.com/backstay/backstay/"
	place := func(pkg string) int {
		return slices.IndexFunc(layers, func(l string) bool { return slices.Contains(strings.Fields(l), pkg) })
	}
	err := filepath.WalkDir(".", func(file string, d fs.DirEntry, err error) error {
		if err != nil || !strings.HasSuffix(file, ".go") || strings.HasSuffix(file, "_test.go") {
			return err
		}
		f, err := parser.ParseFile(token.NewFileSet(), file, nil, parser.ImportsOnly)
		if err != nil {
			return err
		}
		pkg := path.Dir(filepath.ToSlash(file))
		from := place(pkg)
		if from < 0 {
			t.Errorf("%s: package %s has no place in the floor plan", file, pkg)
		}
		for _, spec := range f.Imports {
			imp, _ := strconv.Unquote(spec.Path.Value)
			imp, here := strings.CutPrefix(imp, root)
			switch sim, isSim := strings.CutPrefix(imp, "sim/"); {
			case !here:
			case isSim && place(sim) >= from:
				t.Errorf("%s imports %s, which is not above %s", file, sim, pkg)
			case !isSim && !slices.Contains(ours, strings.TrimPrefix(imp, "internal/")):
				t.Errorf("%s imports %s, which a simulator may not use", file, imp)
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

// What ships is only what is real: nothing but tests, measurements and the second
// binary may import a simulator.
func TestNothingRealNeedsASimulator(t *testing.T) {
	for _, dir := range []string{"../internal", "../cmd/backstay"} {
		err := filepath.WalkDir(dir, func(file string, d fs.DirEntry, err error) error {
			if err != nil || !strings.HasSuffix(file, ".go") || strings.HasSuffix(file, "_test.go") {
				return err
			}
			f, err := parser.ParseFile(token.NewFileSet(), file, nil, parser.ImportsOnly)
			if err != nil {
				return nil // the package's own tests say so
			}
			for _, spec := range f.Imports {
				if strings.Contains(spec.Path.Value, "/backstay/sim/") {
					t.Errorf("%s imports %s", file, spec.Path.Value)
				}
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
}
