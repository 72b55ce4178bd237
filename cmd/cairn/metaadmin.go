package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"

	"github.com/cairnstore/cairn/meta/server"
	"github.com/cairnstore/cairn/proto/pb"
)

// Waits of commands that move a whole state.
const (
	changeWait = 2 * time.Minute  // a new metadata node catches up
	backupWait = 30 * time.Minute // a backup is written and read again
)

func metaAddCommand(c *cli) *cobra.Command {
	var api, replace string
	cmd := &cobra.Command{
		Use:   "add --api HOST:PORT",
		Short: "Add the metadata node that waits at an address",
		Long: `Add the metadata node that waits at an address. It was started with an empty
directory and "join = true" in its configuration; it becomes a voter once it has
everything. An odd number of nodes is best: 1, 3 or 5.`,
		Example: "  cairn meta add --api 10.0.0.4:7100\n  cairn meta add --api 10.0.0.4:7100 --replace meta-2   # meta-2 is dead",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := checkAddr("--api", api); err != nil {
				return usageError{err}
			}
			return c.with(cmd.Context(), changeWait, func(ctx context.Context, s *session) error {
				if replace != "" {
					if _, err := s.meta.RemoveNode(ctx, replace); err != nil {
						return err
					}
					say("metadata node %s is removed", replace)
				}
				nodes, err := s.meta.AddNode(ctx, api)
				if err == nil {
					sayNodes(nodes)
				}
				return err
			})
		},
	}
	cmd.Flags().StringVar(&api, "api", "", "API address of the new node")
	cmd.Flags().StringVar(&replace, "replace", "", "remove this node first")
	must(cmd.MarkFlagRequired("api"))
	return cmd
}

// sayNodes says how many nodes there are and how many may fail.
func sayNodes(nodes []*pb.NodeReply) {
	voters := 0
	for _, n := range nodes {
		if n.Role == "voter" {
			voters++
		}
	}
	say("%d metadata nodes vote; %d may fail", voters, (voters-1)/2)
	if voters%2 == 0 {
		say("an even number is no safer than one less: add or remove one")
	}
}

func metaRemoveCommand(c *cli) *cobra.Command {
	return &cobra.Command{
		Use:   "remove NAME",
		Short: "Take a metadata node out of the cluster for good",
		Long: `Take a metadata node out of the cluster for good, dead or alive. It is refused
when too few of the others answer. Its directory is of no use afterwards.`,
		Example: "  cairn meta remove meta-2",
		Args:    cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return c.with(cmd.Context(), changeWait, func(ctx context.Context, s *session) error {
				nodes, err := s.meta.RemoveNode(ctx, args[0])
				if err == nil {
					sayNodes(nodes)
				}
				return err
			})
		},
	}
}

func metaBackupCommand(c *cli) *cobra.Command {
	return &cobra.Command{
		Use:     "backup FILE",
		Short:   "Write the whole metadata into one file, and read it again",
		Example: "  cairn meta backup /backup/cairn-$(date +%F).meta",
		Args:    cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return c.with(cmd.Context(), backupWait, func(ctx context.Context, s *session) error { return s.backup(ctx, args[0]) })
		},
	}
}

// backup writes the file under another name first, and gives it its own only
// after it has been read again.
func (s *session) backup(ctx context.Context, file string) (err error) {
	tmp := file + ".new"
	f, err := os.OpenFile(tmp, os.O_CREATE|os.O_TRUNC|os.O_RDWR, 0o600)
	if err != nil {
		return err
	}
	defer func() {
		if f != nil {
			err = errors.Join(err, f.Close(), os.Remove(tmp))
		}
	}()
	if err := s.meta.Backup(ctx, f); err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return err
	}
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return err
	}
	h, err := server.CheckBackup(f)
	if err != nil {
		return err
	}
	if err := f.Close(); err != nil {
		return err
	}
	f = nil
	if err := rename(tmp, file); err != nil {
		return err
	}
	say("%s: metadata of cluster %s up to command %d, state hash %s", file, h.Cluster, h.Index, h.Hash)
	return nil
}

func metaRestoreCommand() *cobra.Command {
	var config string
	var check bool
	cmd := &cobra.Command{
		Use:   "restore FILE --config FILE",
		Short: "Make a metadata node's directory out of a backup",
		Long: `Make a metadata node's directory out of a backup: the last resort, when a majority
of the directories is lost. Stop all nodes, move their directories away, run this
on every one of them with the same backup and its own configuration, then start
them. Volumes come back closed: "cairn volume trust" opens each, once you are
sure that little enough was done to it since the backup.`,
		Example: "  cairn meta restore /backup/cairn.meta --config /etc/cairn/meta.toml\n  cairn meta restore /backup/cairn.meta --check",
		Args:    cobra.ExactArgs(1),
		RunE: func(_ *cobra.Command, args []string) error {
			if check {
				return checkBackup(args[0])
			}
			cfg, err := loadMetaConfig(config)
			if err != nil {
				return err
			}
			sc := cfg.server()
			sc.Log = daemonLog(cfg.LogFormat)
			h, err := server.Restore(sc, args[0])
			if err != nil {
				return err
			}
			say("%s holds the metadata of cluster %s as of %s", sc.Dir, h.Cluster, h.Time.Format(time.RFC3339))
			return nil
		},
	}
	cmd.Flags().StringVar(&config, "config", "", "configuration file of the node")
	cmd.Flags().BoolVar(&check, "check", false, "only read the backup and say what it is of")
	cmd.MarkFlagsOneRequired("config", "check")
	return cmd
}

func checkBackup(file string) (err error) {
	f, err := os.Open(filepath.Clean(file))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	h, err := server.CheckBackup(f)
	if err != nil {
		return err
	}
	fmt.Printf("%s: whole; cluster %s, %s, command %d, state hash %s\n", file, h.Cluster, h.Time.Format(time.RFC3339), h.Index, h.Hash)
	return nil
}
