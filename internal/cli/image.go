package cli

import (
	"fmt"
	"path/filepath"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"github.com/backstay/backstay/internal/image"
	"github.com/backstay/backstay/internal/image/open"
)

func (a *app) imageCmd() *cobra.Command {
	return noun("image", "look at and convert disk images, without a repository", a.imageInfoCmd())
}

func (a *app) imageInfoCmd() *cobra.Command {
	var format string
	cmd := &cobra.Command{
		Use:     "info FILE…",
		Short:   "show what disk images are",
		Example: `  backstay image info web01.vhdx`,
		Args:    cobra.MinimumNArgs(1),
		RunE: func(_ *cobra.Command, args []string) error {
			var f image.Format
			if format != "" {
				var err error
				if f, err = parseFormat(format); err != nil {
					return err
				}
			}
			for _, path := range args {
				img, err := open.Open(path, open.Options{Format: f, ParentDir: filepath.Dir(path)})
				if err != nil {
					return err
				}
				info := img.Info()
				img.Close()
				if a.json {
					if err := a.printJSON(info); err != nil {
						return err
					}
					continue
				}
				w := tabwriter.NewWriter(a.stdout, 0, 0, 2, ' ', 0)
				fmt.Fprintf(w, "image\t%s\nformat\t%s %s\nvirtual size\t%s (%d bytes)\nfile size\t%s\n", path, info.Format, info.Variant, sizeText(info.VirtualBytes), info.VirtualBytes, sizeText(info.FileBytes))
				w.Flush()
			}
			return nil
		},
	}
	cmd.Flags().StringVar(&format, "format", "", "what the files are: raw, qcow2, vhd, vhdx or vmdk")
	return cmd
}
