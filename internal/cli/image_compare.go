package cli

import (
	"context"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/backstay/backstay/internal/image/convert"
)

func (a *app) imageCompareCmd() *cobra.Command {
	var in imageInput
	var other string
	cmd := &cobra.Command{
		Use:   "compare FILE OTHER",
		Short: "compare the disks that two images hold",
		Long: `Compare what a guest would see in two images of any formats. They are identical
if every byte is; a longer one must end in zeros, because several formats round
sizes up. Exit code 0 means identical, 1 different.

With --json: identical, offset (the first byte that differs, -1 for none) and
same_size.`,
		Example: `  backstay image compare web01.vhdx restored.qcow2`,
		RunE: func(cmd *cobra.Command, args []string) error {
			args, err := in.files(cmd, args, 2)
			if err != nil {
				return err
			}
			return a.compareImages(cmd.Context(), in, other, args[0], args[1])
		},
	}
	in.flags(cmd, "what FILE is")
	cmd.Flags().StringVarP(&other, "other-format", "F", "", "what OTHER is: "+formatHelp)
	completeWords(cmd, "other-format", readableWords())
	return cmd
}

func (a *app) compareImages(ctx context.Context, in imageInput, otherFormat, first, second string) error {
	x, err := in.open(first, false)
	if err != nil {
		return err
	}
	defer x.Close()
	in.format, in.snapshot, in.disk = otherFormat, "", ""
	y, err := in.open(second, false)
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
