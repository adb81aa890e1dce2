package cli

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/backstay/backstay/internal/image"
	"github.com/backstay/backstay/internal/image/convert"
	"github.com/backstay/backstay/internal/image/open"
)

type convertOptions struct {
	in           imageInput
	format       string
	variant      string
	compression  string
	level        int
	block        sizeFlag
	sector       int
	force        bool
	onlyTop      bool
	parent       string
	parentFormat string
}

func (a *app) imageConvertCmd() *cobra.Command {
	var o convertOptions
	cmd := &cobra.Command{
		Use:   "convert FILE TARGET",
		Short: "write a disk image anew in any format",
		Long: `Write the disk that an image holds to a new image; its format is TARGET's
extension or --output-format. What is zero takes no room. With --parents the
whole chain becomes one image.

With --only-top, TARGET becomes a layer like FILE: it holds what FILE alone
holds, zeros included, over the same parent or over --parent NAME. The name is
written as given, begins at TARGET's directory, and must hold the same disk as
FILE's parent. A format that has no layers gets holes for what FILE does not
hold, with a warning.

TARGET appears when it is whole and durable, and replaces nothing without
--force.

With --json: source, target, format, virtual_bytes, read_bytes and
written_bytes (bytes of the disk that were read, and that were not zero),
duration_ns.`,
		Example: `  backstay image convert web01.vmdk web01.qcow2
  backstay image convert web01.qcow2 web01.vmdk --variant streamOptimized
  backstay image convert disk.bin disk.vhd -f raw --variant fixed
  backstay image convert --parents web01-snapshot.avhdx web01.raw
  backstay image convert --only-top monday.qcow2 monday-copy.qcow2
  backstay image convert --only-top monday.qcow2 monday.vhdx --parent base.vhdx`,
		RunE: func(cmd *cobra.Command, args []string) error {
			args, err := o.in.files(cmd, args, 2)
			if err != nil {
				return err
			}
			return a.convertImage(cmd.Context(), o, args[0], args[1])
		},
	}
	o.in.flags(cmd, "what FILE is")
	f := cmd.Flags()
	f.StringVarP(&o.format, "output-format", "O", "", "what to write: "+strings.Join(formatWords(), ", ")+" (default: by the extension)")
	f.StringVar(&o.variant, "variant", "", "of the format: "+variantHelp())
	f.StringVar(&o.compression, "compression", "", "zlib or zstd, for a compressed qcow2")
	f.IntVar(&o.level, "level", 0, "of compression (default: the format's usual one)")
	f.Var(&o.block, "block-size", "of clusters, blocks or grains (default: the format's usual one)")
	f.IntVar(&o.sector, "sector-size", 0, "of the disk's sectors, 512 or 4096, where the format knows it (default: FILE's)")
	f.BoolVar(&o.force, "force", false, "replace an existing TARGET, once the new one is whole")
	f.BoolVar(&o.onlyTop, "only-top", false, "make a layer of what FILE alone holds")
	f.StringVar(&o.parent, "parent", "", "with --only-top: TARGET's parent, instead of FILE's")
	f.StringVar(&o.parentFormat, "parent-format", "", "what --parent is: "+formatHelp)
	completeWords(cmd, "output-format", formatWords())
	completeWords(cmd, "parent-format", readableWords())
	completeWords(cmd, "sector-size", []string{"512", "4096"})
	var variants, compressions []string
	for _, f := range open.Formats() {
		variants = append(variants, open.Variants(f)...)
		compressions = append(compressions, open.Compressions(f)...)
	}
	completeWords(cmd, "variant", variants)
	completeWords(cmd, "compression", compressions)
	return cmd
}

// variantHelp lists the variants of all formats that have some.
func variantHelp() string {
	var parts []string
	for _, f := range open.Formats() {
		if v := open.Variants(f); len(v) > 0 {
			parts = append(parts, string(f)+" "+strings.Join(v, ", "))
		}
	}
	return strings.Join(parts, "; ")
}

// A convertResult is what image convert --json prints.
type convertResult struct {
	Source       string       `json:"source"`
	Target       string       `json:"target"`
	Format       image.Format `json:"format"`
	VirtualBytes int64        `json:"virtual_bytes"`
	convert.Result
	Duration time.Duration `json:"duration_ns"`
}

func (a *app) convertImage(ctx context.Context, o convertOptions, from, to string) error {
	start := time.Now()
	format, err := o.target(to)
	if err != nil {
		return err
	}
	if err := mayReplace(to, from, o.force); err != nil {
		return err
	}
	src, err := o.in.open(from, o.onlyTop)
	if err != nil {
		return err
	}
	defer src.Close()
	info := src.Info()
	for _, f := range info.Files {
		if !filepath.IsAbs(f) {
			f = filepath.Join(filepath.Dir(from), f)
		}
		if err := mayReplace(to, f, true); err != nil {
			return err
		}
	}
	for _, warning := range info.Warnings {
		a.say("warning: %s: %s", from, clean(warning))
	}
	create, warnings, err := o.create(format, info, to)
	if err != nil {
		return err
	}
	for _, warning := range warnings {
		a.say("warning: %s: %s", to, clean(warning))
	}
	copyTo := func(w image.Writer, co convert.Options) (convert.Result, error) { return convert.Copy(ctx, w, src, co) }
	if create.Parent != "" {
		var whole image.Image
		if o.in.parents {
			if whole, err = o.in.open(from, false); err != nil {
				return err
			}
			defer whole.Close()
		}
		copyTo = func(w image.Writer, co convert.Options) (convert.Result, error) {
			return convert.CopyLayer(ctx, w, src, whole, co)
		}
	}
	bar := a.newBar("converting")
	defer bar.end()
	var res convert.Result
	err = stageImage(to, from, o.force, func(path string) error {
		w, err := open.Create(path, format, create)
		if err != nil {
			return err
		}
		defer w.Close()
		if res, err = copyTo(w, convert.Options{Progress: bar.set}); err != nil {
			return err
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := w.Finish(); err != nil {
			return err
		}
		if w, ok := w.(interface{ Warnings() []string }); ok {
			for _, warning := range w.Warnings() {
				a.say("warning: %s: %s", to, warning)
			}
		}
		return nil
	})
	bar.end()
	if err != nil {
		err = fmt.Errorf("convert %s to %s: %w", from, to, err)
		if errors.Is(err, convert.ErrPartial) {
			return withHint(err, "--parents lets the rest of such units be read from FILE's parent; a smaller --block-size may do without")
		}
		return imageHint(fullHint(err, to), from)
	}
	if a.json {
		return a.printJSON(convertResult{from, to, format, src.Size(), res, time.Since(start)})
	}
	what := "data"
	if create.Parent != "" {
		what = fmt.Sprintf("in this layer over %s", clean(create.Parent))
	}
	fmt.Fprintf(a.stdout, "converted %s to %s (%s): %s, of which %s are %s, in %s\n",
		from, to, format, sizeText(src.Size()), sizeText(res.WrittenBytes), what, timeText(time.Since(start)))
	return nil
}

// target is the format to write, once nothing is wrong with the flags.
func (o convertOptions) target(to string) (image.Format, error) {
	format, known := open.FormatByName(to)
	if o.format != "" {
		var err error
		if format, err = parseFormat(o.format); err != nil {
			return "", err
		}
	} else if !known {
		return "", usage("%s: its extension names no format: say --output-format %s", to, strings.Join(formatWords(), ", "))
	}
	if (o.parent != "" || o.parentFormat != "") && !o.onlyTop {
		return "", usage("--parent goes with --only-top: without it TARGET is the whole disk and has none")
	}
	if o.parentFormat != "" {
		if _, err := (imageInput{format: o.parentFormat}).options("", true); err != nil {
			return "", err
		}
		if o.parent == "" {
			return "", usage("--parent-format says what --parent is, which is missing")
		}
	}
	if err := open.CheckCreate(format, o.asked()); err != nil {
		return "", usageError{err}
	}
	return format, nil
}

// asked are the flags as options.
func (o convertOptions) asked() image.CreateOptions {
	return image.CreateOptions{
		Variant: o.variant, Compression: o.compression, Level: o.level,
		BlockBytes: int64(o.block), SectorBytes: o.sector, Parent: o.parent,
	}
}

// create are the options of the image to, which is to hold the disk of which
// from tells.
func (o convertOptions) create(format image.Format, from image.Info, to string) (c image.CreateOptions, warnings []string, err error) {
	c = o.asked()
	c.VirtualBytes = from.VirtualBytes
	warn := func(format string, args ...any) { warnings = append(warnings, fmt.Sprintf(format, args...)) }
	if big := from.SectorBytes; big > 512 && o.sector == 0 {
		sectors := c
		sectors.SectorBytes = big
		if open.CheckCreate(format, sectors) == nil {
			c.SectorBytes = big
		} else {
			warn("the disk has sectors of %d bytes, of which %s images know nothing: give it to its machine with that sector size", big, format)
		}
	}
	if format == image.VHDX && c.VirtualBytes == 0 {
		warn("a VHDX of 0 bytes is one that other programs do not open")
	}
	switch {
	case !o.onlyTop || from.Parent == "" && o.parent == "":
		return c, warnings, nil
	case !open.Layered(format, o.variant):
		warn("%s images have no layers: what lies in the parent %q is holes here", strings.TrimSpace(string(format)+" "+o.variant), from.Parent)
		return c, warnings, nil
	}
	more, err := o.layer(&c, format, from, to)
	return c, append(warnings, more...), err
}

// layer makes c that of a layer over --parent, or over what from has for a
// parent.
func (o convertOptions) layer(c *image.CreateOptions, format image.Format, from image.Info, to string) (warnings []string, err error) {
	sameKind := format == from.Format
	if sameKind && c.BlockBytes == 0 {
		// What the layer holds then comes in units that fit.
		c.BlockBytes = from.BlockBytes
		if open.CheckCreate(format, *c) != nil {
			c.BlockBytes = 0
		}
	}
	if o.parent == "" {
		if !sameKind && format != image.Qcow2 {
			return nil, usage("a %s layer needs a %s parent, and that of the source is another: name one with --parent", format, format)
		}
		c.Parent, c.ParentFormat = from.Parent, from.ParentFormat
		if c.ParentFormat == "" {
			c.ParentFormat, _ = open.FormatByName(c.Parent)
		}
		if c.ParentFormat == "" {
			return nil, usage("what is the parent %q? name it with --parent and --parent-format", from.Parent)
		}
		c.ParentInfo = parentOf(from)
		name := filepath.FromSlash(strings.ReplaceAll(c.Parent, `\`, "/"))
		if !filepath.IsAbs(name) && !strings.Contains(name, ":") {
			if _, err := os.Stat(filepath.Join(filepath.Dir(to), name)); err != nil {
				warnings = append(warnings, fmt.Sprintf("its parent %q begins at its own directory, where it is not", c.Parent))
			}
		}
		return warnings, nil
	}
	// The user names this file, so it may be opened.
	path := o.parent
	if !filepath.IsAbs(path) {
		path = filepath.Join(filepath.Dir(to), filepath.FromSlash(path))
	}
	parent, err := open.Open(path, open.Options{Format: image.Format(o.parentFormat), OnlyTop: true})
	switch _, gone := os.Lstat(path); {
	case errors.Is(err, open.ErrFormat):
		return nil, withHint(fmt.Errorf("parent: %w", err), "say what it is with --parent-format")
	case err != nil && (gone == nil || !sameKind || from.Parent == ""):
		return nil, imageHint(fmt.Errorf("parent: %w", err), path)
	case err != nil:
		c.ParentFormat, c.ParentInfo = from.ParentFormat, parentOf(from)
		if o.parentFormat != "" {
			c.ParentFormat = image.Format(o.parentFormat)
		}
		return []string{fmt.Sprintf("the parent %s is not there, so nothing was compared with it", path)}, nil
	}
	info := parent.Info()
	parent.Close()
	c.ParentFormat, c.ParentInfo = info.Format, &info
	if was := parentOf(from); sameKind && was.Identity != "" && was.Identity != info.Identity {
		warnings = append(warnings, fmt.Sprintf("its parent has the identity %s and that of the source %s: the disk is right only if both hold the same", info.Identity, was.Identity))
	}
	if info.VirtualBytes != from.VirtualBytes {
		warnings = append(warnings, fmt.Sprintf("its parent has %d bytes and the disk %d", info.VirtualBytes, from.VirtualBytes))
	}
	return warnings, nil
}

// parentOf is what a layer knows of its parent.
func parentOf(child image.Info) *image.Info {
	id, _, _ := strings.Cut(child.FormatDetails["parent identity"], " ")
	return &image.Info{
		Format: child.ParentFormat, Identity: id, VirtualBytes: child.VirtualBytes, SectorBytes: child.SectorBytes,
		// A VHDX has one identity all along its chain, beside that of each file.
		FormatDetails: map[string]string{"disk identity": child.FormatDetails["disk identity"]},
	}
}
