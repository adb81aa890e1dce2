package cli

import (
	"context"
	"fmt"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"github.com/backstay/backstay/internal/extent"
	"github.com/backstay/backstay/internal/image"
	"github.com/backstay/backstay/internal/image/convert"
)

func (a *app) imageMapCmd() *cobra.Command {
	var in imageInput
	var bitmap string
	cmd := &cobra.Command{
		Use:   "map FILE",
		Short: "show which parts of a disk image hold data",
		Long: `Show the disk from its first byte to its last: data, zeros, and what is absent.
Absent ranges are the parent's, or zeros where there is none or it was not
opened; depth counts the layers from the named image, which is 0.

With --bitmap, show instead what a persistent bitmap of a qcow2 image says was
written since it was made. A bitmap that may lack writes is refused.

With --json: one object per extent, ascending, without gaps:
  start, length  bytes of the disk
  kind           data, zero or absent
  depth          the layer that answers, 0 for FILE
  present        false for absent
  zero, data     as qemu-img map has them
  compressed     the bytes lie compressed in the file
  offset         where they lie in the layer's file; missing where they are
                 compressed, spread over several files or in none
With --bitmap: start, length and kind, which is "changed"; all else is not.`,
		Example: `  backstay image map web01.qcow2
  backstay image map --json --parents snapshot.vmdk
  backstay image map --bitmap monday web01.qcow2`,
		RunE: func(cmd *cobra.Command, args []string) error {
			args, err := in.files(cmd, args, 1)
			if err != nil {
				return err
			}
			img, err := in.open(args[0], !in.parents || bitmap != "")
			if err != nil {
				return err
			}
			defer img.Close()
			if bitmap != "" {
				return a.printBitmap(cmd.Context(), img, args[0], bitmap)
			}
			return imageHint(a.printMap(cmd.Context(), img), args[0])
		},
	}
	in.flags(cmd, "what the file is")
	cmd.Flags().StringVar(&bitmap, "bitmap", "", "show what this persistent bitmap of a qcow2 image says was written")
	return cmd
}

// A mapLine is an extent as image map --json prints it. Scripts depend on it,
// and the help describes it.
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

func newMapLine(e image.Extent) mapLine {
	m := mapLine{
		Start: e.Off, Length: e.Len, Kind: e.Kind.String(), Depth: e.Depth,
		Present: e.Kind != image.Absent, Zero: e.Kind != image.Data, Data: e.Kind == image.Data, Compressed: e.Compressed,
	}
	if e.FileOffset >= 0 {
		m.Offset = &e.FileOffset
	}
	return m
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
			if err := a.printJSON(newMapLine(e)); err != nil {
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

// printBitmap shows the changed extents of a persistent bitmap.
func (a *app) printBitmap(ctx context.Context, img image.Image, path, bitmap string) error {
	w := tabwriter.NewWriter(a.stdout, 0, 0, 2, ' ', tabwriter.AlignRight)
	if !a.json {
		fmt.Fprintf(w, "start\tlength\tkind\t\n")
	}
	var changed int64
	lines := 0
	for e, err := range image.Changed(ctx, img, bitmap) {
		if err != nil {
			w.Flush()
			return withHint(fmt.Errorf("%s: %w", path, err), `"backstay image info %s" lists its bitmaps; without one that can be trusted, everything counts as changed`, path)
		}
		changed += e.Len
		if a.json {
			if err := a.printJSON(struct {
				Start  int64  `json:"start"`
				Length int64  `json:"length"`
				Kind   string `json:"kind"`
			}{e.Off, e.Len, "changed"}); err != nil {
				return err
			}
			continue
		}
		fmt.Fprintf(w, "%#x\t%s\tchanged\t\n", e.Off, exactSize(e.Len))
		if lines++; lines%1000 == 0 {
			w.Flush()
		}
	}
	if a.json {
		return nil
	}
	fmt.Fprintf(w, "\t%s\tchanged\t\n", sizeText(changed))
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
