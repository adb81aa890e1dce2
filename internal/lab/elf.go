package lab

import (
	"bufio"
	"bytes"
	"debug/elf"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
)

// kernelModules finds the modules that the named ones need, in the order in
// which they must be loaded. The package's modules.dep does not exist before
// depmod has run, so the modules themselves are asked. A name that is built
// into the kernel has no file and is left out.
func kernelModules(tree string, names ...string) ([]string, error) {
	files := map[string]string{}
	err := filepath.WalkDir(tree, func(file string, d fs.DirEntry, err error) error {
		if err == nil && strings.HasSuffix(file, ".ko") {
			files[moduleName(file)] = file
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	builtin, err := builtinModules(tree)
	if err != nil {
		return nil, err
	}
	var order []string
	seen := map[string]bool{}
	var add func(name string) error
	add = func(name string) error {
		name = moduleName(name)
		if seen[name] || builtin[name] {
			return nil
		}
		seen[name] = true
		file := files[name]
		if file == "" {
			return fmt.Errorf("the kernel package has no module %s", name)
		}
		needs, err := moduleNeeds(file)
		if err != nil {
			return fmt.Errorf("module %s: %w", name, err)
		}
		for _, n := range needs {
			if err := add(n); err != nil {
				return err
			}
		}
		order = append(order, file)
		return nil
	}
	for _, n := range names {
		if err := add(n); err != nil {
			return nil, err
		}
	}
	return order, nil
}

// moduleName is the name of a module as the kernel says it: "-" and "_" are
// one letter.
func moduleName(file string) string {
	return strings.ReplaceAll(strings.TrimSuffix(path.Base(file), ".ko"), "-", "_")
}

func builtinModules(tree string) (map[string]bool, error) {
	lists, err := filepath.Glob(filepath.Join(tree, "*/modules.builtin"))
	if err != nil || len(lists) != 1 {
		return nil, fmt.Errorf("%s: %d kernels in the package, not one", tree, len(lists))
	}
	f, err := os.Open(lists[0])
	if err != nil {
		return nil, err
	}
	defer f.Close()
	names := map[string]bool{}
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		names[moduleName(lines.Text())] = true
	}
	return names, lines.Err()
}

// moduleNeeds reads "depends=" from the .modinfo section.
func moduleNeeds(file string) ([]string, error) {
	f, err := elf.Open(file)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	section := f.Section(".modinfo")
	if section == nil {
		return nil, fmt.Errorf("no .modinfo section")
	}
	info, err := section.Data()
	if err != nil {
		return nil, err
	}
	for entry := range bytes.SplitSeq(info, []byte{0}) {
		if list, ok := bytes.CutPrefix(entry, []byte("depends=")); ok {
			return slices.DeleteFunc(strings.Split(string(list), ","), func(s string) bool { return s == "" }), nil
		}
	}
	return nil, nil
}

// sharedObjects finds the libraries that the program file needs, of all those
// below tree, with the loader first. The names in missing are in no directory.
func sharedObjects(tree, program string) (found, missing []string, err error) {
	have := map[string]string{}
	err = filepath.WalkDir(tree, func(file string, d fs.DirEntry, err error) error {
		// The first of two is as good: the trees have one architecture.
		if err == nil && !d.IsDir() && strings.Contains(d.Name(), ".so") && have[d.Name()] == "" {
			have[d.Name()] = file
		}
		return err
	})
	if err != nil {
		return nil, nil, err
	}
	queue, seen := []string{program}, map[string]bool{}
	for ; len(queue) > 0; queue = queue[1:] {
		f, err := elf.Open(queue[0])
		if err != nil {
			return nil, nil, fmt.Errorf("%s: %w", queue[0], err)
		}
		needs, err := f.ImportedLibraries()
		f.Close()
		if err != nil {
			return nil, nil, fmt.Errorf("%s: %w", queue[0], err)
		}
		if queue[0] == program {
			needs = append([]string{"ld-linux-x86-64.so.2"}, needs...)
		}
		for _, name := range needs {
			switch {
			case seen[name]:
			case have[name] == "":
				missing = append(missing, name)
			default:
				found = append(found, have[name])
				queue = append(queue, have[name])
			}
			seen[name] = true
		}
	}
	return found, missing, nil
}
