package cli

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"path/filepath"
	"slices"
	"strings"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"github.com/backstay/backstay/internal/extent"
	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/image"
	"github.com/backstay/backstay/internal/image/convert"
	"github.com/backstay/backstay/internal/image/open"
)

func (a *app) imageCmd() *cobra.Command {
	return noun("image", "look at, convert and compare disk images, without a repository",
		a.imageInfoCmd(), a.imageMapCmd(), a.imageConvertCmd(), a.imageCompareCmd())
}

// imageInput is how the user says which image to read and what it may open.
type imageInput struct {
	format   string
	snapshot string
	parents  bool
}

const formatHelp = "raw, qcow2, vhd, vhdx or vmdk (default: by name and content)"

func (in *imageInput) flags(cmd *cobra.Command, what string) {
	f := cmd.Flags()
	f.StringVarP(&in.format, "format", "f", "", what+": "+formatHelp)
	f.StringVar(&in.snapshot, "snapshot", "", "read this internal snapshot of a qcow2 image, by name or ID")
	f.BoolVar(&in.parents, "parents", false, "open parents and data files that lie in or beneath the image's directory (extents of a VMDK right beside it are always opened)")
}

// open opens path as in says. Images whose parents are not wanted open without
// them if onlyTop.
func (in imageInput) open(path string, onlyTop bool) (image.Image, error) {
	o := open.Options{Snapshot: in.snapshot, OnlyTop: onlyTop}
	if in.format != "" {
		f, err := parseFormat(in.format)
		if err != nil {
			return nil, err
		}
		o.Format = f
	}
	if in.parents {
		o.ParentDir = filepath.Dir(path)
	}
	img, err := open.Open(path, o)
	return img, imageHint(err, path)
}

// imageHint says what to do about an image that does not open.
func imageHint(err error, path string) error {
	switch {
	case errors.Is(err, open.ErrFormat):
		return withHint(err, "say what it is with --format")
	case errors.Is(err, image.ErrNotAllowed):
		return withHint(err, "if you trust the image, --parents opens what lies in or beneath %s", filepath.Dir(path))
	case errors.Is(err, fault.ErrCorrupt):
		return withHint(err, "the file was cut or damaged, or is of another format than its name says; --format overrides that")
	}
	return err
}

func (a *app) imageInfoCmd() *cobra.Command {
	var in imageInput
	cmd := &cobra.Command{
		Use:   "info FILE…",
		Short: "show what disk images are",
		Long: `Show the format, sizes, parent and peculiarities of disk images. Of a chain only
the named layer is opened, unless --parents.`,
		Example: `  backstay image info web01.vhdx
  backstay image info --json *.vmdk`,
		Args: cobra.MinimumNArgs(1),
		RunE: func(_ *cobra.Command, args []string) error {
			for i, path := range args {
				img, err := in.open(path, !in.parents)
				if err != nil {
					return err
				}
				info := img.Info()
				img.Close()
				if err := a.printImageInfo(path, info, i > 0); err != nil {
					return err
				}
			}
			return nil
		},
	}
	in.flags(cmd, "what the files are")
	return cmd
}

func (a *app) printImageInfo(path string, info image.Info, gap bool) error {
	if a.json {
		return a.printJSON(struct {
			File string `json:"file"`
			image.Info
		}{path, info})
	}
	if gap {
		fmt.Fprintln(a.stdout)
	}
	w := tabwriter.NewWriter(a.stdout, 0, 0, 2, ' ', 0)
	line := func(label, format string, args ...any) {
		fmt.Fprintf(w, "%s\t%s\n", label, clean(fmt.Sprintf(format, args...)))
	}
	text := func(label, value string) {
		if value != "" {
			line(label, "%s", value)
		}
	}
	line("image", "%s", path)
	version := ""
	if info.Version > 0 {
		version = fmt.Sprintf(", version %d", info.Version)
	}
	line("format", "%s%s", strings.TrimSpace(string(info.Format)+" "+info.Variant), version)
	line("virtual size", "%s (%d bytes)", sizeText(info.VirtualBytes), info.VirtualBytes)
	line("file size", "%s (%d bytes)", sizeText(info.FileBytes), info.FileBytes)
	if info.BlockBytes > 0 {
		line("block size", "%s", sizeText(info.BlockBytes))
	}
	if info.SectorBytes > 0 {
		line("sector size", "%d bytes", info.SectorBytes)
	}
	text("compression", info.Compression)
	text("creator", info.Creator)
	text("identity", info.Identity)
	text("parent", info.Parent)
	text("parent format", string(info.ParentFormat))
	text("snapshots", strings.Join(info.Snapshots, ", "))
	text("bitmaps", strings.Join(info.Bitmaps, ", "))
	for _, key := range slices.Sorted(maps.Keys(info.FormatDetails)) {
		text(key, info.FormatDetails[key])
	}
	for _, warning := range info.Warnings {
		line("warning", "%s", warning)
	}
	return w.Flush()
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

func (a *app) imageMapCmd() *cobra.Command {
	var in imageInput
	cmd := &cobra.Command{
		Use:   "map FILE",
		Short: "show which parts of a disk image hold data",
		Long: `Show the disk from its first byte to its last: data, zeros, and what is absent.
Absent ranges are the parent's, or zeros where there is none or it was not
opened; depth counts the layers from the named image, which is 0.`,
		Example: `  backstay image map web01.qcow2
  backstay image map --json --parents snapshot.vmdk`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			img, err := in.open(args[0], !in.parents)
			if err != nil {
				return err
			}
			defer img.Close()
			return imageHint(a.printMap(cmd.Context(), img), args[0])
		},
	}
	in.flags(cmd, "what the file is")
	return cmd
}

// A mapLine is an extent as image map --json prints it. Data, zero, present
// and offset are as qemu-img has them.
type mapLine struct {
	Start      int64  `json:"start"`
	Length     int64  `json:"length"`
	Kind       string `json:"kind"`
	Depth      int    `json:"depth"`
	Present    bool   `json:"present"`
	Zero       bool   `json:"zero"`
	Data       bool   `json:"data"`
	Compressed bool   `json:"compressed"`
	Offset     *int64 `json:"offset,omitempty"`
}

func (a *app) printMap(ctx context.Context, img image.Image) error {
	w := tabwriter.NewWriter(a.stdout, 0, 0, 2, ' ', tabwriter.AlignRight)
	if !a.json {
		fmt.Fprintf(w, "start\tlength\tkind\tdepth\tat\t\n")
	}
	var bytes [3]int64
	lines := 0
	for e, err := range convert.Map(ctx, img, extent.Extent{Len: img.Size()}) {
		if err != nil {
			w.Flush()
			return err
		}
		bytes[e.Kind%3] += e.Len
		if a.json {
			m := mapLine{
				Start: e.Off, Length: e.Len, Kind: e.Kind.String(), Depth: e.Depth,
				Present: e.Kind != image.Absent, Zero: e.Kind != image.Data, Data: e.Kind == image.Data, Compressed: e.Compressed,
			}
			if e.FileOffset >= 0 {
				m.Offset = &e.FileOffset
			}
			if err := a.printJSON(m); err != nil {
				return err
			}
			continue
		}
		at := "-"
		switch {
		case e.Compressed:
			at = "compressed"
		case e.FileOffset >= 0:
			at = fmt.Sprintf("%#x", e.FileOffset)
		}
		fmt.Fprintf(w, "%#x\t%s\t%s\t%d\t%s\t\n", e.Off, exactSize(e.Len), e.Kind, e.Depth, at)
		if lines++; lines%1000 == 0 {
			w.Flush() // a long map must not be kept whole
		}
	}
	if a.json {
		return nil
	}
	fmt.Fprintf(w, "\t%s\tdata\t\t\t\n\t%s\tzero\t\t\t\n\t%s\tabsent\t\t\t\n", sizeText(bytes[image.Data]), sizeText(bytes[image.Zero]), sizeText(bytes[image.Absent]))
	return w.Flush()
}

// exactSize is n bytes in the largest unit that it is a whole number of.
func exactSize(n int64) string {
	units := []string{"", "K", "M", "G", "T"}
	i := 0
	for n != 0 && n%1024 == 0 && i < len(units)-1 {
		n, i = n/1024, i+1
	}
	return fmt.Sprintf("%d%s", n, units[i])
}

func (a *app) imageCompareCmd() *cobra.Command {
	var in imageInput
	var other string
	cmd := &cobra.Command{
		Use:   "compare FILE OTHER",
		Short: "compare the disks that two images hold",
		Long: `Compare what a guest would see in two images of any formats. They are identical
if every byte is; a longer one must end in zeros, because several formats round
sizes up. Exit code 0 means identical, 1 different.`,
		Example: `  backstay image compare web01.vhdx restored.qcow2`,
		Args:    cobra.ExactArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.compareImages(cmd.Context(), in, other, args[0], args[1])
		},
	}
	in.flags(cmd, "what FILE is")
	cmd.Flags().StringVarP(&other, "other-format", "F", "", "what OTHER is: "+formatHelp)
	return cmd
}

func (a *app) compareImages(ctx context.Context, in imageInput, otherFormat, first, second string) error {
	x, err := in.open(first, false)
	if err != nil {
		return err
	}
	defer x.Close()
	y, err := imageInput{format: otherFormat, parents: in.parents}.open(second, false)
	if err != nil {
		return err
	}
	defer y.Close()
	bar := a.newBar("comparing")
	defer bar.end()
	c, err := convert.Compare(ctx, x, y, convert.Options{Progress: bar.set})
	bar.end()
	if err != nil {
		return imageHint(fmt.Errorf("compare %s and %s: %w", first, second, err), first)
	}
	if !c.Identical {
		a.code = exitFailed
	}
	if a.json {
		return a.printJSON(c)
	}
	switch {
	case !c.Identical:
		fmt.Fprintf(a.stdout, "different: the first difference is at byte %d\n", c.Offset)
	case !c.SameSize:
		fmt.Fprintf(a.stdout, "identical, but of %d and %d bytes: the longer one ends in zeros\n", x.Size(), y.Size())
	default:
		fmt.Fprintln(a.stdout, "identical")
	}
	return nil
}
