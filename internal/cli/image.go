package cli

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/image"
	"github.com/backstay/backstay/internal/image/open"
	"github.com/backstay/backstay/internal/image/ova"
)

func (a *app) imageCmd() *cobra.Command {
	return noun("image", "look at, convert and compare disk images, without a repository",
		a.imageInfoCmd(), a.imageMapCmd(), a.imageChainCmd(), a.imageConvertCmd(), a.imageCompareCmd())
}

// imageInput is how the user says which image to read and what it may open.
type imageInput struct {
	format   string
	snapshot string
	disk     string
	parents  bool
	// parentDir is where parents may lie; empty for the image's own directory.
	parentDir string
}

var formatHelp = oneOf(readableWords()) + " (default: by name and content)"

func (in *imageInput) flags(cmd *cobra.Command, what string) {
	f := cmd.Flags()
	f.StringVarP(&in.format, "format", "f", "", what+": "+formatHelp)
	f.StringVar(&in.snapshot, "snapshot", "", "read this internal snapshot of a qcow2 image, by name or ID")
	f.StringVar(&in.disk, "disk", "", "read this disk of an appliance (.ova) that has several, by number from 1, ID or file")
	f.Var((*parentsFlag)(in), "parents", "open parents and data files that lie in or beneath the image's directory, or beneath DIR (extents of a VMDK right beside it are always opened)")
	f.Lookup("parents").NoOptDefVal = "true"
	completeWords(cmd, "format", readableWords())
}

// A parentsFlag is "--parents" for the image's own directory, or
// "--parents=DIR".
type parentsFlag imageInput

func (p *parentsFlag) Type() string { return "DIR" }
func (p *parentsFlag) String() string {
	if !p.parents {
		return ""
	}
	return p.parentDir
}

func (p *parentsFlag) Set(s string) error {
	p.parents, p.parentDir = true, ""
	if on, err := strconv.ParseBool(s); err == nil {
		p.parents = on
		return nil
	}
	st, err := os.Stat(s)
	if err != nil || !st.IsDir() {
		return fmt.Errorf("%q is no directory", s)
	}
	p.parentDir = s
	return nil
}

// files are the n images that args name, or any number if n is 0. A flag whose
// value may be left out does not see a value behind a blank, so the directory of
// "--parents DIR" is among args; no image is a directory, so it can be told.
func (in *imageInput) files(cmd *cobra.Command, args []string, n int) ([]string, error) {
	if in.parents && in.parentDir == "" && len(args) > n {
		isDir := func(arg string) bool {
			st, err := os.Stat(arg)
			return err == nil && st.IsDir()
		}
		if i := slices.IndexFunc(args, isDir); i >= 0 {
			in.parentDir = args[i]
			args = slices.Delete(slices.Clone(args), i, i+1)
		}
	}
	check := cobra.ExactArgs(n)
	if n == 0 {
		check = cobra.MinimumNArgs(1)
	}
	if err := check(cmd, args); err != nil {
		return nil, usageError{err}
	}
	return args, nil
}

// open opens path in the way that in says. Images whose parents are not wanted
// open without them if onlyTop.
func (in imageInput) open(path string, onlyTop bool) (image.Image, error) {
	o, err := in.options(path, onlyTop)
	if err != nil {
		return nil, err
	}
	img, err := open.Open(path, o)
	if in.snapshot != "" && errors.Is(err, fault.ErrNotFound) {
		err = withHint(err, `"backstay image info %s" lists its snapshots`, path)
	}
	return img, imageHint(err, path)
}

func (in imageInput) options(path string, onlyTop bool) (open.Options, error) {
	o := open.Options{Snapshot: in.snapshot, Disk: in.disk, OnlyTop: onlyTop}
	if in.format != "" {
		o.Format = image.Format(in.format)
		if !slices.Contains(open.Readable(), o.Format) {
			return o, usage("unknown format %q: want %s", in.format, oneOf(readableWords()))
		}
	}
	if in.parents {
		o.ParentDir = in.parentDir
		if o.ParentDir == "" {
			o.ParentDir = filepath.Dir(path)
		}
	}
	return o, nil
}

// imageHint says what to do about an image that does not open.
func imageHint(err error, path string) error {
	var renamed *open.RenamedError
	var c coded
	switch {
	case err == nil, errors.As(err, &c):
		return err
	case errors.As(err, &renamed):
		return withHint(err, "%s has the identity that the parent %q must have (%s): if it is that image, give it the name back", renamed.File, renamed.Parent, renamed.Identity)
	case errors.Is(err, ova.ErrWhichDisk):
		return withHint(err, "name it with --disk")
	case errors.Is(err, open.ErrFormat):
		return withHint(err, "say what it is with --format")
	case errors.Is(err, image.ErrNotAllowed):
		return withHint(err, "if you trust the image, --parents opens what lies in or beneath %s, and --parents=DIR what lies beneath DIR", filepath.Dir(path))
	case errors.Is(err, fs.ErrNotExist) && isPathError(err, path):
		return withHint(fmt.Errorf("image %s: no such file: %w", path, fault.ErrNotFound), "check the name; relative names begin at the current directory")
	case errors.Is(err, fault.ErrNotFound):
		return withHint(err, "copy the missing file to where it is named, or say with --parents=DIR in which directory it may lie")
	case errors.Is(err, fault.ErrCorrupt):
		return withHint(err, "the file was cut or damaged, or is of another format than its name says; --format overrides that")
	}
	return err
}

// isPathError says whether err is about the file path and no other.
func isPathError(err error, path string) bool {
	var p *fs.PathError
	return errors.As(err, &p) && p.Path == path
}

// fullHint puts a full disk into its class, and says what to do about it.
func fullHint(err error, target string) error {
	if !errors.Is(err, syscall.ENOSPC) && !errors.Is(err, syscall.EDQUOT) && !errors.Is(err, fault.ErrNoSpace) {
		return err
	}
	if !errors.Is(err, fault.ErrNoSpace) {
		err = fmt.Errorf("%w: %w", fault.ErrNoSpace, err)
	}
	return withHint(err, "free space in %s or choose another target; nothing half-made is left", filepath.Dir(target))
}

// completeWords lets the shell complete the values of a flag.
func completeWords(cmd *cobra.Command, flag string, words []string) {
	// It fails only for a flag that does not exist.
	if err := cmd.RegisterFlagCompletionFunc(flag, cobra.FixedCompletions(words, cobra.ShellCompDirectiveNoFileComp)); err != nil {
		panic(err)
	}
}

// formatWords are the formats that can be written.
func formatWords() []string { return words(open.Formats()) }

// readableWords are the formats that can be read.
func readableWords() []string { return words(open.Readable()) }

func words(formats []image.Format) []string {
	var list []string
	for _, f := range formats {
		list = append(list, string(f))
	}
	return list
}

// oneOf is "a, b or c".
func oneOf(list []string) string {
	last := len(list) - 1
	return strings.Join(list[:last], ", ") + " or " + list[last]
}

// clean makes text from a stranger's header fit for a terminal.
func clean(s string) string {
	return strings.Map(func(r rune) rune {
		if r < ' ' || r >= 0x7f && r < 0xa0 || r == '\ufffd' {
			return '?'
		}
		return r
	}, s)
}
