package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/cairnstore/cairn/chunk/backup"
	nbdclient "github.com/cairnstore/cairn/nbd/client"
	"github.com/cairnstore/cairn/proto/pb"
	"github.com/cairnstore/cairn/proto/status"
)

// repoHelp ends the help of every command that takes a REPO.
const repoHelp = `

REPO is a directory, or s3://BUCKET[/PREFIX] with AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID and
AWS_SECRET_ACCESS_KEY in the environment.`

// openBucket finds where backups lie.
func openBucket(repo string, create bool) (backup.Bucket, error) {
	if strings.HasPrefix(repo, "s3://") {
		return backup.OpenS3(repo)
	}
	return backup.OpenDir(repo, create)
}

func openRepo(ctx context.Context, repo string, create bool) (*backup.Repo, error) {
	b, err := openBucket(repo, create)
	if err != nil {
		return nil, err
	}
	return backup.Open(ctx, b, create)
}

func volumeBackup(c *cli) *cobra.Command {
	var full, breakLock bool
	create := func(cmd *cobra.Command, args []string) error {
		if len(args) != 2 {
			return usagef("name a volume and where its backups are to lie: see `%s --help`", cmd.CommandPath())
		}
		return c.with(cmd.Context(), imageWait, func(ctx context.Context, s *session) error {
			if _, err := s.volume(ctx, args[0]); err != nil { // before a repository is made
				return err
			}
			repo, err := openRepo(ctx, args[1], true)
			if err != nil {
				return err
			}
			return withLock(ctx, repo, args[0], breakLock, func(ctx context.Context) error {
				return s.backupVolume(ctx, repo, args[0], full)
			})
		})
	}
	cmd := &cobra.Command{
		Use: "backup VOLUME REPO", Short: "Copy a volume out of the cluster: what has changed since its last backup",
		Long: `Copy a volume, which may be in use, to a directory or an S3-compatible store. A snapshot is
taken, and what differs from the last backup's snapshot is read and written; what is there
already is not written again. The snapshot stays until the next backup. A backup that was
cut short, by kill -9 too, goes on where it was when the command is given again. Every
object is named by its SHA-256.` + repoHelp,
		Example: "  cairn volume backup db /mnt/backup\n  cairn volume backup db s3://disks/cluster-1\n  cairn volume backup ls /mnt/backup\n  cairn volume restore /mnt/backup db db-restored",
		Args:    cobra.ArbitraryArgs, RunE: create,
	}
	sub := &cobra.Command{Use: "create VOLUME REPO", Short: "The same, whatever the volume is called", Args: cobra.ExactArgs(2), RunE: create,
		Example: "  cairn volume backup create db /mnt/backup"}
	for _, x := range []*cobra.Command{cmd, sub} {
		x.Flags().BoolVar(&full, "full", false, "read all of the volume, not only what has changed")
		breakLockFlag(x, &breakLock)
	}
	cmd.AddCommand(sub, backupList(), backupShow(), backupVerify(), backupRemove())
	return cmd
}

func breakLockFlag(cmd *cobra.Command, to *bool) {
	cmd.Flags().BoolVar(to, "break-lock", false, "begin although another command says it is writing there: when that is known to be dead")
}

// withLock runs f while the backups of a volume, or of all, are locked.
func withLock(ctx context.Context, repo *backup.Repo, volume string, force bool, f func(context.Context) error) error {
	locked, l, err := repo.Lock(ctx, volume, who(), force)
	if err != nil {
		return err
	}
	for _, b := range l.Broken {
		say("the lock of %s is removed", b)
	}
	if err = f(locked); err != nil && locked.Err() != nil && ctx.Err() == nil {
		err = context.Cause(locked)
	}
	return errors.Join(err, l.Unlock())
}

// backupVolume makes a backup, or goes on with the one that was cut short.
func (s *session) backupVolume(ctx context.Context, repo *backup.Repo, name string, full bool) error {
	v, err := s.volume(ctx, name)
	if err != nil {
		return err
	}
	older, err := repo.Backups(ctx, name)
	if err != nil {
		return err
	}
	x, err := s.unfinished(ctx, repo, v, older)
	if err != nil {
		return err
	}
	var base *backup.Index
	if x == nil {
		if x, err = s.beginBackup(ctx, repo, v, older, full); err != nil {
			return err
		}
	}
	for _, o := range older {
		if x.Base != "" && o.ID == x.Base {
			base = o
		}
	}
	if x.Base != "" && base == nil {
		return errors.Join(status.Errorf(status.Conflict, "backup %s was begun upon one that is gone: give the command again", x.Name()), repo.Drop(ctx, x))
	}
	req := &pb.DiffRequest{Volume: name, To: x.Snapshot}
	if base != nil {
		req.From = base.Snapshot
	}
	dirty := backup.Dirty{}
	err = s.diff(ctx, req, func(r *pb.Range) error {
		if base != nil || !r.Zero {
			dirty.Add(r.Offset, r.Length)
		}
		return nil
	})
	if err != nil {
		return err
	}
	bar := newBar("backing up "+x.Name(), dirty.Bytes())
	err = s.withDevice(ctx, name+"@"+x.Snapshot, func(dev *nbdclient.Client) error {
		return repo.Create(ctx, x, base, dirty, dev, bar.add)
	})
	bar.finish(err)
	if err != nil {
		return err
	}
	fmt.Println(x.Name())
	say("%s read, %s written", formatSize(x.Read), formatSize(x.Written))
	return s.dropOldSnapshots(ctx, name, older)
}

// snapshotOf finds a backup's snapshot in its volume.
func snapshotOf(v *pb.Volume, x *backup.Index) *pb.Layer {
	for _, l := range v.Layers {
		if v.Id == x.VolumeID && l.State == pb.LayerState_LAYER_STATE_SNAPSHOT && l.Name == x.Snapshot && l.CreatedUnixNs == x.CutUnixNs {
			return l
		}
	}
	return nil
}

// unfinished finds the backup of a volume that was cut short and can be gone on
// with; one that cannot is dropped.
func (s *session) unfinished(ctx context.Context, repo *backup.Repo, v *pb.Volume, complete []*backup.Index) (*backup.Index, error) {
	running, err := repo.Running(ctx, v.Name)
	if err != nil {
		return nil, err
	}
	for _, x := range running {
		done := slices.ContainsFunc(complete, func(o *backup.Index) bool { return o.ID == x.ID })
		if !done && snapshotOf(v, x) != nil {
			say("going on with backup %s, of which %d chunks are done", x.Name(), len(x.Done))
			return x, repo.Begin(ctx, x)
		}
		if err := repo.Drop(ctx, x); err != nil {
			return nil, err
		}
	}
	return nil, nil
}

// beginBackup takes a snapshot and notes that it is being backed up.
func (s *session) beginBackup(ctx context.Context, repo *backup.Repo, v *pb.Volume, older []*backup.Index, full bool) (*backup.Index, error) {
	id := time.Now().UTC().Format("20060102-150405.000")
	id = strings.ReplaceAll(id, ".", "-")
	x := &backup.Index{Volume: v.Name, VolumeID: v.Id, ID: id, Snapshot: "backup-" + id}
	for _, o := range older { // the newest whose snapshot is there
		if !full && snapshotOf(v, o) != nil {
			x.Base = o.ID
		}
	}
	if _, err := s.takeSnapshot(ctx, x.Snapshot, []string{v.Name}); err != nil {
		return nil, err
	}
	v, err := s.volume(ctx, v.Name)
	if err != nil {
		return nil, err
	}
	for _, l := range v.Layers {
		if l.State == pb.LayerState_LAYER_STATE_SNAPSHOT && l.Name == x.Snapshot {
			x.CutUnixNs, x.SizeBytes = l.CreatedUnixNs, l.SizeBytes
			return x, repo.Begin(ctx, x)
		}
	}
	return nil, status.Errorf(status.NotFound, "snapshot %s of volume %s was deleted while it was to be backed up", x.Snapshot, v.Name)
}

// dropOldSnapshots deletes the snapshots of backups that are no longer the last.
func (s *session) dropOldSnapshots(ctx context.Context, name string, older []*backup.Index) error {
	v, err := s.volume(ctx, name)
	if err != nil {
		return err
	}
	for _, o := range older {
		if snapshotOf(v, o) == nil {
			continue
		}
		op := &pb.DeleteSnapshot{Volume: name, Name: o.Snapshot}
		_, err := s.meta.Do(ctx, &pb.Command{Op: &pb.Command_DeleteSnapshot{DeleteSnapshot: op}})
		if status.Of(err) == status.Held { // a clone reads from it: it goes another time
			say("snapshot %s@%s stays: %v", name, o.Snapshot, err)
		} else if err != nil {
			return fmt.Errorf("the backup is complete, but an older one's snapshot is still there: %w", err)
		}
	}
	return nil
}

func volumeRestore(c *cli) *cobra.Command {
	var replicas uint32
	cmd := &cobra.Command{
		Use: "restore REPO VOLUME[@BACKUP] NEW", Short: "Make a new volume of a backup", Args: cobra.ExactArgs(3),
		Long: `Make a new volume of a backup: of the last one, or the one that is named. What a damaged
object holds is never written: the command fails, naming it, and leaves no volume. Until
all is there its name is NEW.part; cut short, by kill -9 too, the same command goes on.` + repoHelp,
		Example: "  cairn volume restore /mnt/backup db db-restored\n  cairn volume restore s3://disks/cluster-1 db@20260102-030405-678 db-then",
		RunE: func(cmd *cobra.Command, args []string) error {
			return c.with(cmd.Context(), imageWait, func(ctx context.Context, s *session) error {
				repo, err := openRepo(ctx, args[0], false)
				if err != nil {
					return err
				}
				x, err := repo.Find(ctx, args[1])
				if err != nil {
					return err
				}
				return s.restoreVolume(ctx, repo, x, args[2], replicas)
			})
		},
		ValidArgsFunction: noCompletion,
	}
	cmd.Flags().Uint32Var(&replicas, "replicas", 0, "copies, 1 to 5 (default 3, or as many as there are failure domains)")
	return cmd
}

func (s *session) restoreVolume(ctx context.Context, repo *backup.Repo, x *backup.Index, name string, replicas uint32) error {
	op := &pb.CreateVolume{Name: name, SizeBytes: x.SizeBytes, Replicas: replicas, Tags: map[string]string{"restored-from": x.Name()}}
	return s.fillVolume(ctx, op, func(dev *nbdclient.Client, again bool) error {
		var there io.ReaderAt
		if again {
			there = dev
		}
		bar := newBar("restoring "+x.Name(), x.Bytes())
		err := repo.Restore(ctx, x, there, failing{dev}, bar.add)
		bar.finish(err)
		return err
	})
}

// noCompletion is for arguments only the person knows.
func noCompletion(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
	return nil, cobra.ShellCompDirectiveDefault
}

// backupView is a backup as `-o json` shows it.
type backupView struct {
	Volume    string `json:"volume"`
	ID        string `json:"id"`
	Complete  bool   `json:"complete"`
	Created   string `json:"created"` // when the volume was so
	SizeBytes uint64 `json:"sizeBytes"`
	Chunks    int    `json:"chunks"`       // that are not all zeros, 64 MiB each
	Read      uint64 `json:"readBytes"`    // from the volume
	Written   uint64 `json:"writtenBytes"` // that were not there yet
	Base      string `json:"base,omitempty"`
	Snapshot  string `json:"snapshot"`
}

func viewBackup(x *backup.Index, complete bool) backupView {
	return backupView{x.Volume, x.ID, complete, x.Created().Format(time.RFC3339), x.SizeBytes, len(x.Chunks), x.Read, x.Written, x.Base, x.Snapshot}
}

func backupList() *cobra.Command {
	var out outputFlag
	cmd := &cobra.Command{
		Use: "ls REPO [VOLUME]", Aliases: []string{"list"}, Short: "List backups, oldest first", Args: cobra.RangeArgs(1, 2),
		Example: "  cairn volume backup ls /mnt/backup\n  cairn volume backup ls /mnt/backup db -o json",
		RunE: func(cmd *cobra.Command, args []string) error {
			repo, err := openRepo(cmd.Context(), args[0], false)
			if err != nil {
				return err
			}
			volume := strings.Join(args[1:], "")
			complete, err := repo.Backups(cmd.Context(), volume)
			if err != nil {
				return err
			}
			running, err := repo.Running(cmd.Context(), volume)
			if err != nil {
				return err
			}
			views, rows := []backupView{}, [][]string{}
			for i, x := range append(complete, running...) {
				w := viewBackup(x, i < len(complete))
				state := "complete"
				if !w.Complete {
					state = "cut short, or running"
				}
				views = append(views, w)
				rows = append(rows, []string{x.Name(), w.Created, formatSize(w.SizeBytes), formatSize(w.Read), formatSize(w.Written), dash(w.Base), state})
			}
			return out.show(views, []string{"BACKUP", "OF", "SIZE", "READ", "WRITTEN", "SINCE", "STATE"}, rows)
		},
	}
	out.register(cmd)
	return cmd
}

func backupShow() *cobra.Command {
	var out outputFlag
	cmd := &cobra.Command{
		Use: "show REPO VOLUME[@BACKUP]", Short: "Show a backup: the last, or the one named", Args: cobra.ExactArgs(2),
		Example: "  cairn volume backup show /mnt/backup db",
		RunE: func(cmd *cobra.Command, args []string) error {
			repo, err := openRepo(cmd.Context(), args[0], false)
			if err != nil {
				return err
			}
			x, err := repo.Find(cmd.Context(), args[1])
			if err != nil {
				return err
			}
			w := viewBackup(x, true)
			return out.show(w, nil, [][]string{{"backup", x.Name()}, {"of", w.Created}, {"size", formatSize(w.SizeBytes)}, {"chunks", fmt.Sprint(w.Chunks)},
				{"read", formatSize(w.Read)}, {"written", formatSize(w.Written)}, {"since", dash(w.Base)}, {"snapshot", w.Snapshot}})
		},
	}
	out.register(cmd)
	return cmd
}

// verifyView is the result of a verification as `-o json` shows it.
type verifyView struct {
	Backups int           `json:"backups"`
	Objects int           `json:"objects"`
	Bad     []damagedView `json:"bad"`
}

type damagedView struct {
	Backup string `json:"backup"`
	Offset uint64 `json:"offset"`
	Why    string `json:"why"`
}

func backupVerify() *cobra.Command {
	var out outputFlag
	cmd := &cobra.Command{
		Use: "verify REPO [VOLUME[@BACKUP]]", Short: "Read backups and check every checksum", Args: cobra.RangeArgs(1, 2),
		Long:    "Read all backups, or those of a volume, or one, and check every checksum. Each object is read once." + repoHelp,
		Example: "  cairn volume backup verify /mnt/backup\n  cairn volume backup verify /mnt/backup db",
		RunE: func(cmd *cobra.Command, args []string) error {
			repo, err := openRepo(cmd.Context(), args[0], false)
			if err != nil {
				return err
			}
			var xs []*backup.Index
			if name := strings.Join(args[1:], ""); strings.Contains(name, "@") {
				x, err := repo.Find(cmd.Context(), name)
				if err != nil {
					return err
				}
				xs = []*backup.Index{x}
			} else if xs, err = repo.Backups(cmd.Context(), name); err != nil {
				return err
			}
			return verifyBackups(cmd.Context(), repo, xs, &out)
		},
	}
	out.register(cmd)
	return cmd
}

func verifyBackups(ctx context.Context, repo *backup.Repo, xs []*backup.Index, out *outputFlag) error {
	total := int64(0)
	for _, x := range xs {
		total += x.Bytes()
	}
	bar := newBar("verifying", total)
	bad, objects, err := repo.Verify(ctx, xs, bar.add)
	bar.finish(err)
	if err != nil {
		return err
	}
	v, rows := verifyView{len(xs), objects, []damagedView{}}, [][]string{}
	for _, b := range bad {
		v.Bad = append(v.Bad, damagedView{b.Backup, b.Offset, b.Why})
		rows = append(rows, []string{b.Backup, fmt.Sprint(b.Offset), b.Why})
	}
	var header []string
	if len(rows) > 0 {
		header = []string{"BACKUP", "OFFSET", "WHY"}
	}
	if err := out.show(v, header, rows); err != nil {
		return err
	}
	if len(bad) > 0 {
		return status.Errorf(status.Corrupt, "%d places of %d backups cannot be restored: back up with --full while the volume is there", len(bad), len(xs))
	}
	say("%d objects of %d backups are what they were", objects, len(xs))
	return nil
}

func backupRemove() *cobra.Command {
	var breakLock bool
	cmd := &cobra.Command{
		Use: "rm REPO [VOLUME@BACKUP…]", Short: "Remove backups, and what no other one needs", Args: cobra.MinimumNArgs(1),
		Long: `Remove backups, in any order, and all objects that no other backup needs. With none named
only those: what was cut short has left them. Refused while a backup is being made.` + repoHelp,
		Example: "  cairn volume backup rm /mnt/backup db@20260102-030405-678",
		RunE: func(cmd *cobra.Command, args []string) error {
			for _, a := range args[1:] {
				if v, id := splitSnapshot(a); v == "" || id == "" {
					return usagef("%q does not name a backup: write VOLUME@BACKUP", a)
				}
			}
			repo, err := openRepo(cmd.Context(), args[0], false)
			if err != nil {
				return err
			}
			return withLock(cmd.Context(), repo, "", breakLock, func(ctx context.Context) error {
				freed, err := repo.Remove(ctx, args[1:])
				if err != nil {
					return err
				}
				say("%d objects removed", freed)
				return nil
			})
		},
	}
	breakLockFlag(cmd, &breakLock)
	return cmd
}
