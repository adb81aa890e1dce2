package cli

import (
	"os"

	"github.com/spf13/cobra"

	"github.com/backstay/backstay/internal/demo"
)

func (a *app) demoCmd() *cobra.Command {
	var dir string
	cmd := &cobra.Command{
		Use:   "demo",
		Short: "back up, destroy and restore a real VM on this machine",
		Long: `Build a small Linux guest from Debian packages, start it under a libvirt of its
own, back it up, let it change, back it up again, destroy the VM and its disk,
restore it, boot it, and show that the guest's own check passes.

It takes up to three minutes, by software emulation; it needs root, libvirt and
QEMU ("make demo" installs them), keeps everything in one directory and removes
it at the end.`,
		Example: `  backstay demo`,
		Args:    noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			exe, err := os.Executable()
			if err != nil {
				return err
			}
			return demo.Run(cmd.Context(), demo.Options{Dir: dir, Out: a.stdout, Backstay: exe})
		},
	}
	cmd.Flags().StringVar(&dir, "dir", "", "directory for everything the demo makes (default: a new temporary one)")
	return cmd
}
