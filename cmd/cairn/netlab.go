package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"runtime"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/cairnstore/cairn/chaos/netlab"
	"github.com/cairnstore/cairn/netplane/bird"
)

const labWait = 60 * time.Second

func netLabCommand(c *cli) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "lab",
		Short: "A leaf-spine network with a cairn cluster in it, on this machine, to cut and look at",
		Long: `A leaf-spine network of namespaces with a real cairn cluster in it, on this machine.
Needs root, BIRD and nft. Nothing outside its directory is touched, and nothing is left
when it ends. --dir names the directory; one lab runs in each.`,
		Example: `  cairn net lab up --dir /tmp/lab                  in one terminal
  cairn net lab exec --dir /tmp/lab host-1 cairn volume create v --size 1G
  cairn net lab exec --dir /tmp/lab host-1 cairn volume attach v --host host-1
  cairn net lab drop-data --dir /tmp/lab spine-1
  cairn net lab exec --dir /tmp/lab host-1 cairn status
  cairn net lab heal --dir /tmp/lab all`,
	}
	cmd.AddCommand(labUpCommand(c), labExecCommand(c))
	for _, d := range []struct{ do, short string }{
		{"cut", "Take the carrier from a link (host-1:spine-1), or from all links of a spine or host"},
		{"silence", "Have a spine drop all it gets and sends, with its links up"},
		{"drop-data", "Have a spine drop what it should pass on, and answer routing: nobody is told"},
		{"narrow", "Have a spine drop packets of more than 1400 bytes, as a path with a wrong MTU does"},
		{"heal", "Undo what was done to a link, a spine, a host or all"},
	} {
		cmd.AddCommand(&cobra.Command{
			Use: d.do + " PART", Short: d.short, Example: "  cairn net lab " + d.do + " --dir /tmp/lab spine-1",
			Args: cobra.ExactArgs(1),
			RunE: func(cmd *cobra.Command, args []string) error {
				return netlab.Ask(cmd.Context(), c.localDir(), d.do, args[0])
			},
		})
	}
	return cmd
}

func labUpCommand(c *cli) *cobra.Command {
	var cfg netlab.Config
	var protocol string
	var empty, verbose bool
	cmd := &cobra.Command{
		Use: "up", Short: "Build a lab and run a cluster in it, until Ctrl-C",
		Example: "  cairn net lab up --dir /tmp/lab --spines 2 --hosts 4",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg.Dir, cfg.Protocol, cfg.Bare = c.localDir(), bird.Protocol(protocol), !empty
			if verbose {
				cfg.Log = slog.New(slog.NewTextHandler(os.Stderr, nil))
			}
			return labUp(cmd.Context(), cfg)
		},
	}
	f := cmd.Flags()
	f.IntVar(&cfg.Spines, "spines", 2, "spines, 1 to 4")
	f.IntVar(&cfg.Hosts, "hosts", 4, "hosts, 2 to 8")
	f.StringVar(&protocol, "protocol", "bgp", "bgp, ospf, rip or static")
	f.IntVar(&cfg.MTU, "mtu", 0, "of all links (default 1500)")
	f.BoolVar(&cfg.NoBFD, "no-bfd", false, "notice silent neighbours by the protocol's own timers only")
	f.BoolVar(&empty, "no-cluster", false, "only the network: routing, no cairn in it")
	f.BoolVar(&verbose, "verbose", false, "say what the routing daemons say")
	return cmd
}

func labUp(ctx context.Context, cfg netlab.Config) (err error) {
	began := time.Now()
	if err := os.MkdirAll(cfg.Dir, 0o700); err != nil {
		return fmt.Errorf("cannot make the lab's directory: %w", err)
	}
	lock, err := lockFile(cfg.Dir + "/lock")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, lock.Close()) }()
	l, err := netlab.New(cfg)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, l.Close()) }()
	var cluster *netlab.Cluster
	if cfg.Bare {
		exe, err := os.Executable()
		if err != nil {
			return err
		}
		if cluster, err = l.StartCluster(ctx, exe); err != nil {
			return err
		}
		defer func() { err = errors.Join(err, cluster.Close()) }()
	}
	wait, cancel := context.WithTimeout(ctx, labWait)
	defer cancel()
	if _, err := l.Converged(wait); err != nil {
		return err
	}
	fmt.Printf("the lab is ready: %d spines, %d hosts in %s (%.1f s)\n", cfg.Spines, cfg.Hosts, cfg.Dir, time.Since(began).Seconds())
	return l.Serve(ctx, cluster)
}

func labExecCommand(c *cli) *cobra.Command {
	cmd := &cobra.Command{
		Use: "exec NODE COMMAND…", Short: "Run a command inside a node of the lab; CAIRN_META names its cluster",
		Example: "  cairn net lab exec --dir /tmp/lab host-1 ip route\n  cairn net lab exec --dir /tmp/lab host-1 cairn net show",
		Args:    cobra.MinimumNArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			ns, meta, err := netlab.Enter(cmd.Context(), c.localDir(), args[0])
			if err != nil {
				return err
			}
			bin, err := exec.LookPath(args[1])
			if args[1] == "cairn" { // this very program
				bin, err = os.Executable()
			}
			if err != nil {
				return err
			}
			fd, err := unix.Open(ns, unix.O_RDONLY|unix.O_CLOEXEC, 0)
			if err != nil {
				return fmt.Errorf("cannot reach the node's namespace: %w", err)
			}
			runtime.LockOSThread() // the thread that becomes the command
			if err := unix.Setns(fd, unix.CLONE_NEWNET); err != nil {
				return fmt.Errorf("cannot enter the node's namespace: %w", err)
			}
			return syscall.Exec(bin, args[1:], append(os.Environ(), "CAIRN_META="+meta, "CAIRN_DIR="))
		},
	}
	cmd.Flags().SetInterspersed(false) // what follows NODE is the command's
	return cmd
}
