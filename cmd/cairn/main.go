// Command cairn is all of cairn in one binary: the daemons of a cluster and the
// command line that admins, VM hosts and chaos suites use.
//
// Duty: wiring, flags, signals, tables. Floor: F5. It decides nothing about
// data: volumes are chunk/volume's, configuration is meta/state's.
//
// Files by what they are for:
//
//	main, output          the command tree, exit status, tables and JSON
//	config, cluster       configuration files; the directory of a local cluster
//	metad, hostd, control one metadata node (slack: what its wakeups cost); one host; what the CLI asks of a host
//	up, supervise         a whole cluster in one process, or one process each
//	connect               finding the metadata service and a host from the CLI
//	volume, volumeadmin, image, vm  commands on volumes, their contents, and VMs
//	metaadmin, hostadmin  nodes that come and go, backups; hosts that join and drain
//	netd, netshow, route  the storage network: a host's part, the picture, routes and events
//	status                status, hosts, stores, metadata nodes, events
//	demo, bench, chaos    the main job shown, measured, and attacked
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"runtime/debug"
	"strconv"
	"strings"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/cairnstore/cairn/meta/state"
	"github.com/cairnstore/cairn/proto/status"
)

// Exit statuses: scripts depend on them.
const (
	exitOK     = 0
	exitFailed = 1
	exitUsage  = 2
)

// usageError marks what the user typed wrong.
type usageError struct{ error }

func (u usageError) Unwrap() error { return u.error }

// exitAs is an outcome with an exit status of its own; the error in it, if there is
// one, is reported.
type exitAs struct {
	error
	code int
}

func (e exitAs) Unwrap() error { return e.error }

func usagef(format string, args ...any) error { return usageError{fmt.Errorf(format, args...)} }

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := rootCommand().ExecuteContext(ctx)
	stop()
	os.Exit(report(err))
}

// report prints an error as one sentence and returns the exit status.
func report(err error) int {
	if as, ok := err.(exitAs); ok {
		if as.error != nil {
			report(as.error)
		}
		return as.code
	}
	if err == nil {
		return exitOK
	}
	fmt.Fprintln(os.Stderr, "cairn: "+err.Error())
	var u usageError
	if errors.As(err, &u) || status.Of(err) == status.Invalid {
		return exitUsage
	}
	return exitFailed
}

// version is the commit this program was built from, and what decides whether it
// goes together with others.
func version() string {
	commit := program()
	if commit == "" {
		commit = "of an unknown commit"
	}
	return fmt.Sprintf("%s, state version %d", commit, state.Format)
}

// program is the commit this program was built from; "": that is not known.
func program() (commit string) {
	if info, ok := debug.ReadBuildInfo(); ok {
		for _, s := range info.Settings {
			if s.Key == "vcs.revision" {
				commit = s.Value[:min(12, len(s.Value))]
			}
			if s.Key == "vcs.modified" && s.Value == "true" {
				commit += ", changed"
			}
		}
	}
	return commit
}

func rootCommand() *cobra.Command {
	root := &cobra.Command{
		Use:   "cairn",
		Short: "Distributed block storage for virtual machines",
		Long: `cairn keeps thin volumes replicated over several hosts and exports them over NBD.

Start here:
  cairn up                                a whole cluster in this terminal, in one process
  cairn volume create v --size 1G         a thin volume
  cairn volume attach v                   prints its NBD URI, for qemu-img, nbdcopy, fio, …`,
		Version:       version(),
		SilenceErrors: true,
		SilenceUsage:  true,
	}
	root.SetFlagErrorFunc(func(c *cobra.Command, err error) error {
		return usagef("%s: see `%s --help`", plainly(err), c.CommandPath())
	})
	c := &cli{}
	f := root.PersistentFlags()
	f.StringVar(&c.dir, "dir", os.Getenv("CAIRN_DIR"), "directory of a local cluster (CAIRN_DIR; default "+defaultDir()+")")
	f.StringVar(&c.meta, "meta", os.Getenv("CAIRN_META"), "metadata nodes of a remote cluster, host:port[,host:port…] (CAIRN_META)")
	root.AddCommand(upCommand(c), downCommand(c), metaCommand(c), hostCommand(c), configCommand(),
		volumeCommand(c), vmCommand(c), storeCommand(c), netCommand(c), routeCommand(c), tenantCommand(c), dfCommand(c), statusCommand(c), whyCommand(c), eventsCommand(c), placeCommand(c),
		demoCommand(), benchCommand(), chaosCommand())
	root.AddCommand(deviceCommand())
	asUsage(root)
	c.completion(root)
	return root
}

// plainly says what is wrong with a flag without the words of Go's parsers.
func plainly(err error) string {
	var num *strconv.NumError
	if text := err.Error(); errors.As(err, &num) {
		return strings.Replace(text, num.Error(), "it is no number that is possible here", 1)
	} else if i := strings.Index(text, "strconv."); i >= 0 {
		return text[:i] + "it is no number that is possible here"
	}
	return err.Error()
}

// wanted is what a command's use line says it takes.
func wanted(cmd *cobra.Command) string {
	if _, what, ok := strings.Cut(cmd.Use, " "); ok && !strings.HasPrefix(what, "--") {
		return what
	}
	return "no argument"
}

// asUsage makes wrong arguments and missing flags of every command usage
// errors, and an unknown subcommand too.
func asUsage(c *cobra.Command) {
	if args := c.Args; args != nil {
		c.Args = func(cmd *cobra.Command, a []string) error {
			if args(cmd, a) != nil {
				return usagef("%s takes %s: see `%s --help`", cmd.CommandPath(), wanted(cmd), cmd.CommandPath())
			}
			if err := cmd.ValidateRequiredFlags(); err != nil {
				return usagef("%w: see `%s --help`", err, cmd.CommandPath())
			}
			if f := cmd.Flags().Lookup("output"); f != nil {
				return (&outputFlag{f.Value.String()}).check()
			}
			return nil
		}
	}
	if c.HasSubCommands() && c.RunE == nil {
		c.Args = cobra.ArbitraryArgs
		c.RunE = func(cmd *cobra.Command, a []string) error {
			if len(a) > 0 {
				return usagef("%s has no command %q: see `%s --help`", cmd.CommandPath(), a[0], cmd.CommandPath())
			}
			return cmd.Help()
		}
	}
	for _, s := range c.Commands() {
		asUsage(s)
	}
}
