package cli

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/backstay/backstay/internal/image"
)

func (a *app) imageInfoCmd() *cobra.Command {
	var in imageInput
	cmd := &cobra.Command{
		Use:   "info FILE…",
		Short: "show what disk images are",
		Long: `Show the format, sizes, parent and peculiarities of disk images. Of a chain only
the named layer is opened, unless --parents. A file that does not open is told
on stderr, and the others are shown all the same.

With --json: one object per image, with at least file, format, virtual_bytes
(the disk's size as a guest sees it) and file_bytes (the length of the file, or
of all files of a split image; holes count). Where the format has them:
block_bytes (cluster, block or grain), sector_bytes, variant, version,
compression, creator, identity, parent, parent_format, snapshots and
snapshot_details, bitmaps and bitmap_details, files (what else it is read from),
details, warnings.`,
		Example: `  backstay image info web01.vhdx
  backstay image info --json *.vmdk`,
		RunE: func(cmd *cobra.Command, args []string) error {
			args, err := in.files(cmd, args, 0)
			if err != nil {
				return err
			}
			for i, path := range args {
				err := a.imageInfo(cmd.Context(), in, path, i > 0)
				if err != nil && len(args) == 1 {
					return err
				}
				if err != nil {
					a.tell(err, cmd)
				}
			}
			return nil
		},
	}
	in.flags(cmd, "what the files are")
	return cmd
}

// tell reports an error that does not end the command, which will end with its
// exit code or a worse one.
func (a *app) tell(err error, cmd *cobra.Command) {
	fmt.Fprintf(a.stderr, "backstay: %v\n", err)
	for _, h := range hints(err, cmd) {
		fmt.Fprintf(a.stderr, "hint: %s\n", h)
	}
	a.code = worse(a.code, exitCode(err))
}

func (a *app) imageInfo(ctx context.Context, in imageInput, path string, gap bool) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	img, err := in.open(path, !in.parents)
	if err != nil {
		return err
	}
	defer img.Close()
	return a.printImageInfo(path, img.Info(), gap)
}

// shownNames bounds how many snapshots or bitmaps are shown to people.
const shownNames = 20

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
	list := func(label string, names []string, more func(i int) string) {
		for i, name := range names {
			if i == shownNames {
				line(label, "… and %d more, which --json lists", len(names)-i)
				return
			}
			if m := more(i); m != "" {
				name += " (" + m + ")"
			}
			line(label, "%s", name)
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
	list("snapshot", info.Snapshots, func(i int) string {
		if i >= len(info.SnapshotInfo) {
			return ""
		}
		s := info.SnapshotInfo[i]
		more := fmt.Sprintf("id %s, made %s, disk of %s", s.ID, s.Made.UTC().Format(time.RFC3339), sizeText(s.VirtualBytes))
		if s.StateBytes > 0 {
			more += fmt.Sprintf(", and %s of the machine's memory", sizeText(s.StateBytes))
		}
		return more
	})
	list("bitmap", info.Bitmaps, func(i int) string {
		if i >= len(info.BitmapInfo) {
			return ""
		}
		b := info.BitmapInfo[i]
		more := sizeText(b.Granularity) + " a bit"
		if b.Recording {
			more += ", recording"
		}
		if !b.Trusted {
			more += ", not to be trusted: it may lack writes"
		}
		return more
	})
	for _, key := range slices.Sorted(maps.Keys(info.FormatDetails)) {
		text(key, info.FormatDetails[key])
	}
	for _, warning := range info.Warnings {
		line("warning", "%s", warning)
	}
	return w.Flush()
}
