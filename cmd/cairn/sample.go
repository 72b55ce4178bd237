package main

import (
	"fmt"
	"io/fs"
	"os"
	"strings"

	"github.com/spf13/cobra"

	"github.com/cairnstore/cairn/docs/samples"
)

// sampleNames are the files of docs/samples.
func sampleNames() []string {
	names, err := fs.Glob(samples.Files, "*")
	must(err) // the pattern is right
	return names
}

func sampleCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "sample [NAME]",
		Short: "Print a sample: configurations, systemd units, alert rules, a dashboard",
		Long: "Print a sample to begin with, or the names of all. Of three machines each gets a\n" +
			"meta.toml and a host.toml with its own name and addresses.",
		Example:   "  cairn config sample\n  cairn config sample host.toml > /etc/cairn/host.toml\n  cairn config check /etc/cairn/host.toml",
		Args:      cobra.MaximumNArgs(1),
		ValidArgs: sampleNames(),
		RunE: func(_ *cobra.Command, args []string) error {
			if len(args) == 0 {
				fmt.Println(strings.Join(sampleNames(), "\n"))
				return nil
			}
			b, err := samples.Files.ReadFile(args[0])
			if err != nil {
				return usagef("there is no sample %q: %s", args[0], strings.Join(sampleNames(), ", "))
			}
			_, err = os.Stdout.Write(b)
			return err
		},
	}
}
