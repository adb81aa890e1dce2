package cli

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"

	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/image"
	"github.com/backstay/backstay/internal/image/convert"
	"github.com/backstay/backstay/internal/image/open"
)

type convertOptions struct {
	in          imageInput
	format      string
	variant     string
	compression string
	level       int
	block       sizeFlag
	force       bool
}

func (a *app) imageConvertCmd() *cobra.Command {
	var o convertOptions
	cmd := &cobra.Command{
		Use:   "convert FILE TARGET",
		Short: "write a disk image anew in any format",
		Long: `Write the disk that an image holds to a new image; its format is TARGET's
extension or --output-format. What is zero takes no room. With --parents the
whole chain becomes one image.

TARGET appears when it is whole and durable, and replaces nothing without
--force.`,
		Example: `  backstay image convert web01.vmdk web01.qcow2
  backstay image convert web01.qcow2 web01.vmdk --variant streamOptimized
  backstay image convert disk.bin disk.vhd -f raw --variant fixed`,
		Args: cobra.ExactArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.convertImage(cmd.Context(), o, args[0], args[1])
		},
	}
	o.in.flags(cmd, "what FILE is")
	f := cmd.Flags()
	f.StringVarP(&o.format, "output-format", "O", "", "what to write: raw, qcow2, vhd, vhdx or vmdk (default: by the extension)")
	f.StringVar(&o.variant, "variant", "", "of the format: dynamic, fixed; monolithicSparse, monolithicFlat, streamOptimized")
	f.StringVar(&o.compression, "compression", "", "zlib or zstd, for a compressed qcow2")
	f.IntVar(&o.level, "level", 0, "of compression (default: the format's usual one)")
	f.Var(&o.block, "block-size", "of clusters, blocks or grains (default: the format's usual one)")
	f.BoolVar(&o.force, "force", false, "replace an existing TARGET, once the new one is whole")
	return cmd
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
	format, known := open.FormatByName(to)
	if o.format != "" {
		var err error
		if format, err = parseFormat(o.format); err != nil {
			return err
		}
	} else if !known {
		return usage("%s: its extension names no format: say --output-format raw, qcow2, vhd, vhdx or vmdk", to)
	}
	if o.level < 0 {
		return usage("--level %d: want a positive number", o.level)
	}
	if err := mayReplace(to, from, o.force); err != nil {
		return err
	}
	src, err := o.in.open(from, false)
	if err != nil {
		return err
	}
	defer src.Close()
	for _, warning := range src.Info().Warnings {
		a.say("warning: %s: %s", from, clean(warning))
	}
	bar := a.newBar("converting")
	defer bar.end()
	var res convert.Result
	err = stageImage(to, from, o.force, func(path string) error {
		w, err := open.Create(path, format, image.CreateOptions{
			VirtualBytes: src.Size(), Variant: o.variant, Compression: o.compression, Level: o.level, BlockBytes: int64(o.block),
		})
		if err != nil {
			return err
		}
		defer w.Close()
		if res, err = convert.Copy(ctx, w, src, convert.Options{Progress: bar.set}); err != nil {
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
		return imageHint(fmt.Errorf("convert %s to %s: %w", from, to, err), from)
	}
	if a.json {
		return a.printJSON(convertResult{from, to, format, src.Size(), res, time.Since(start)})
	}
	fmt.Fprintf(a.stdout, "converted %s to %s (%s): %s, of which %s are data, in %s\n",
		from, to, format, sizeText(src.Size()), sizeText(res.WrittenBytes), timeText(time.Since(start)))
	return nil
}

// mayReplace says why no image may be put at path. An image is never converted
// onto itself: it would be gone if the result were of no use.
func mayReplace(path, source string, force bool) error {
	info, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if src, err := os.Stat(source); err == nil && os.SameFile(src, info) {
		return usage("%s is the image to convert; choose another target", path)
	}
	switch {
	case !force:
		return withHint(fmt.Errorf("%s: %w", path, fault.ErrExists), "choose another target, or --force to replace it")
	case !info.Mode().IsRegular():
		// A link leads to somebody else's file, and a device can't be replaced.
		return withHint(fmt.Errorf("%s is no regular file: %w", path, fault.ErrExists), "choose another target: --force replaces files alone")
	}
	return nil
}

// stageImage lets create make an image, which may be several files, in a
// directory beside target under their final names, and moves them to where
// they belong when create returned nil.
func stageImage(target, source string, force bool, create func(path string) error) error {
	dir, name := filepath.Dir(target), filepath.Base(target)
	stage, err := os.MkdirTemp(dir, "."+name+".*.partial")
	if err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("directory %s: %w", dir, fault.ErrNotFound)
		}
		return err
	}
	defer os.RemoveAll(stage)
	if err := create(filepath.Join(stage, name)); err != nil {
		return err
	}
	entries, err := os.ReadDir(stage)
	if err != nil {
		return err
	}
	// The target itself comes last: it makes the others count.
	names := make([]string, 0, len(entries))
	for _, e := range entries {
		if e.Name() == name {
			continue
		}
		if err := mayReplace(filepath.Join(dir, e.Name()), source, force); err != nil {
			return err
		}
		names = append(names, e.Name())
	}
	names = append(names, name)
	for i, n := range names {
		to := filepath.Join(dir, n)
		if err := putFile(filepath.Join(stage, n), to, force); err != nil {
			if !force {
				for _, done := range names[:i] {
					os.Remove(filepath.Join(dir, done))
				}
			}
			return err
		}
	}
	return image.SyncDir(target)
}

// putFile moves a file. Without force it never replaces one, even if that
// appeared a moment ago.
func putFile(from, to string, force bool) error {
	if force {
		return os.Rename(from, to)
	}
	err := os.Link(from, to)
	switch {
	case err == nil:
		return os.Remove(from)
	case errors.Is(err, fs.ErrExist):
		return fmt.Errorf("%s: %w", to, fault.ErrExists)
	}
	// A file system without hard links.
	if _, err := os.Lstat(to); !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%s: %w", to, fault.ErrExists)
	}
	return os.Rename(from, to)
}
