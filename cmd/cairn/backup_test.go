package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/minio/minio-go/v7"
	"github.com/minio/minio-go/v7/pkg/credentials"
)

// s3Server starts an S3 server on a directory, with one bucket, and points the
// environment at it.
func s3Server(t *testing.T) (objects string) {
	t.Helper()
	server := os.Getenv("CAIRN_VERSITYGW")
	if server == "" {
		t.Fatal("CAIRN_VERSITYGW names no S3 server: run `make test-int`")
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	addr := l.Addr().String()
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	objects = t.TempDir()
	cmd := exec.Command(server, "--port", addr, "--access", "test", "--secret", "secretsecret", "--quiet", "posix", objects)
	var said bytes.Buffer
	cmd.Stdout, cmd.Stderr = &said, &said
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := cmd.Process.Kill(); err != nil {
			t.Error(err)
		}
		_ = cmd.Wait() // it was killed
		if t.Failed() {
			t.Logf("the S3 server said: %s", said.String())
		}
	})
	for k, v := range map[string]string{"AWS_ENDPOINT_URL": "http://" + addr, "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "secretsecret", "AWS_REGION": "us-east-1"} {
		t.Setenv(k, v)
	}
	c, err := minio.New(addr, &minio.Options{Creds: credentials.NewStaticV4("test", "secretsecret", "")})
	if err != nil {
		t.Fatal(err)
	}
	until(t, "the S3 server takes a bucket", func() bool {
		return c.MakeBucket(context.Background(), "disks", minio.MakeBucketOptions{}) == nil
	})
	return objects
}

// dataObjects lists the pieces and lists of a repository, as files.
func dataObjects(t *testing.T, root string) (files []string) {
	t.Helper()
	err := filepath.WalkDir(root, func(p string, e fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err == nil && !e.IsDir() && len(e.Name()) == 64 {
			files = append(files, p)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return files
}

// A disk in use is backed up to a directory and to an S3 server: the second time
// what has changed, found without reading the rest; both can be restored; a flipped
// bit is named and never restored; what newer backups need outlives older ones.
func TestBackupAndRestore(t *testing.T) {
	stored := s3Server(t)
	n := startUp(t, dir(t))
	for _, c := range []struct{ repo, files string }{{filepath.Join(filepath.Dir(n.dir), "repo"), filepath.Join(filepath.Dir(n.dir), "repo")}, {"s3://disks/cluster/1", stored}} {
		n.ok("volume", "create", "v", "--size", "200M")
		uri := n.ok("volume", "attach", "v")
		write := func(cmd string) {
			t.Helper()
			tool(t, "qemu-io", "-f", "raw", uri, "-c", cmd, "-c", "flush")
		}
		write("write -P 1 3M 20M")
		write("write -P 2 190M 10M")
		first, one := n.image("v"), n.ok("volume", "backup", "v", c.repo)
		write("write -P 3 5000k 8k")
		write("write -z -u 191M 2M")
		n.ok("volume", "resize", "v", "--size", "300M")
		write("write -P 4 299M 1M")
		second, two := n.image("v"), n.ok("volume", "backup", "v", c.repo)
		w := decodeJSON[backupView](t, n.ok("volume", "backup", "show", c.repo, "v", "-o", "json"))
		if w.Volume+"@"+w.ID != two || w.Base == "" || w.Read > 8<<20 || w.Written > 3<<20 {
			t.Fatalf("the second backup %s is %+v", two, w)
		}
		if v := decodeJSON[volumeView](t, n.ok("volume", "show", "v", "-o", "json")); len(v.Snapshots) != 1 {
			t.Fatalf("snapshots after two backups: %v", v.Snapshots)
		}
		restored := func(backup string, want []byte) {
			t.Helper()
			n.ok("volume", "restore", c.repo, backup, "r")
			if !bytes.Equal(n.image("r"), want) {
				t.Fatalf("%s restored shows something else", backup)
			}
			n.ok("volume", "rm", "r", "--now")
		}
		restored(one, first)
		restored("v", second)
		n.ok("volume", "backup", "verify", c.repo)
		before := len(dataObjects(t, c.files))
		n.ok("volume", "backup", "rm", c.repo, one)
		if after := len(dataObjects(t, c.files)); after >= before {
			t.Fatalf("%d objects, before the removal %d", after, before)
		}
		restored(two, second)
		n.damage(c.repo, dataObjects(t, c.files)[0])
		n.ok("volume", "detach", "v")
		n.ok("volume", "snapshot", "rm", "v@"+w.Snapshot)
		n.ok("volume", "rm", "v", "--now")
	}
	n.fails("no bucket nowhere", "volume", "backup", "ls", "s3://nowhere")
	t.Setenv("AWS_SECRET_ACCESS_KEY", "wrong")
	n.fails("refuses these keys", "volume", "backup", "ls", "s3://disks/cluster/1")
}

// damage spoils an object in several ways, each of which must be named in one
// sentence, and mends it.
func (n *node) damage(repo, file string) {
	n.t.Helper()
	good, err := os.ReadFile(file)
	if err != nil {
		n.t.Fatal(err)
	}
	flipped := bytes.Clone(good)
	flipped[len(good)/2] ^= 1
	put := func(b []byte) {
		n.t.Helper()
		if err := os.WriteFile(file, b, 0o600); err != nil {
			n.t.Fatal(err)
		}
	}
	object := filepath.Base(file)
	for _, bad := range [][]byte{flipped, good[:len(good)/2], {}, append(bytes.Clone(good), "garbage"...)} {
		put(bad)
		if r := n.cairn("volume", "restore", repo, "v", "r"); r.status != exitFailed || !strings.Contains(r.err, object) || strings.Contains(r.err, "\n") {
			n.t.Fatalf("restore of a bad object: status %d, %s", r.status, r.err)
		}
		n.fails("no volume", "volume", "show", "r")
		n.fails("no volume", "volume", "show", "r.part")
		if r := n.cairn("volume", "backup", "verify", repo); r.status != exitFailed || !strings.Contains(r.out, object) {
			n.t.Fatalf("verify of a bad object: status %d, %s, %s", r.status, r.out, r.err)
		}
	}
	put(good)
	n.ok("volume", "backup", "verify", repo)
}

// begun starts a command of the cluster beside the test.
func (n *node) begun(args ...string) *exec.Cmd {
	n.t.Helper()
	cmd := exec.Command(bin(n.t), append(args, "--dir", n.dir)...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		n.t.Fatal(err)
	}
	return cmd
}

// killed ends what begun has started in the middle, with -9.
func (n *node) killed(cmd *exec.Cmd) {
	n.t.Helper()
	if err := cmd.Process.Kill(); err != nil {
		n.t.Fatal(err)
	}
	if err := cmd.Wait(); err == nil {
		n.t.Fatalf("%v was done before it was killed", cmd.Args)
	}
}

// A backup whose command is killed with -9 goes on where it was, of the same
// moment, when it is given again, and so does a restore; while one runs there is no
// other of the same volume.
func TestKilledBackupGoesOn(t *testing.T) {
	n := startUp(t, dir(t), "--hosts", "1")
	base := filepath.Dir(n.dir)
	img, repo := make([]byte, 192<<20), filepath.Join(base, "repo")
	rng := rand.NewChaCha8([32]byte{9})
	if _, err := rng.Read(img); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(base, "img"), img, 0o600); err != nil {
		t.Fatal(err)
	}
	n.ok("volume", "import", "v", filepath.Join(base, "img"))
	cmd := n.begun("volume", "backup", "v", repo)
	until(t, "some of the backup is there", func() bool { return len(dataObjects(t, repo)) > 5 })
	if err := cmd.Process.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	n.fails("volume v is being backed up in "+repo+" by "+who()+", process "+fmt.Sprint(cmd.Process.Pid), "volume", "backup", "v", repo)
	n.fails("volume v is being backed up", "volume", "backup", "rm", repo)
	n.killed(cmd)
	cut := decodeJSON[[]backupView](t, n.ok("volume", "backup", "ls", repo, "-o", "json"))
	if len(cut) != 1 || cut[0].Complete {
		t.Fatalf("after the kill: %+v", cut)
	}
	n.fails("is not complete", "volume", "backup", "rm", repo)
	tool(t, "qemu-io", "-f", "raw", n.ok("volume", "attach", "v"), "-c", "write -P 1 0 1M", "-c", "flush")
	if name := n.ok("volume", "backup", "v", repo); name != fmt.Sprintf("v@%s", cut[0].ID) {
		t.Fatalf("%s was made, not gone on with %s", name, cut[0].ID)
	}
	w := decodeJSON[backupView](t, n.ok("volume", "backup", "show", repo, "v", "-o", "json"))
	if w.Written >= uint64(len(img)) {
		t.Fatalf("everything was written again: %+v", w)
	}
	for _, what := range []string{".tmp", "locks"} {
		left, err := os.ReadDir(filepath.Join(repo, what))
		if err != nil || len(left) > 0 {
			t.Fatalf("%s after a backup: %v, %v", what, left, err)
		}
	}
	cmd = n.begun("volume", "restore", repo, "v", "r")
	until(t, "some of it is restored", func() bool {
		r := n.cairn("volume", "show", "r.part", "-o", "json")
		return r.status == 0 && decodeJSON[volumeView](t, r.out).Allocated > 0
	})
	n.killed(cmd)
	n.fails("no volume", "volume", "show", "r")
	n.fails("volume r.part is there", "volume", "import", "r", filepath.Join(base, "img"))
	if r := n.cairn("volume", "restore", repo, "v", "r"); r.status != 0 || !strings.Contains(r.err, "going on with volume r.part") {
		t.Fatalf("the restore is not gone on with: %d, %s", r.status, r.err)
	}
	if !bytes.Equal(n.image("r"), img) {
		t.Fatal("what was restored is not what was backed up")
	}
	if v := decodeJSON[volumeView](t, n.ok("volume", "show", "r", "-o", "json")); v.Tags["restored-from"] != "v@"+w.ID || v.Holder != "" {
		t.Fatalf("the restored volume is %+v", v)
	}
	n.fails("no volume", "volume", "show", "r.part")
	for _, c := range []struct {
		args   []string
		status int
		say    string
	}{
		{[]string{"volume", "backup", "v"}, exitUsage, "where its backups are to lie"},
		{[]string{"volume", "backup", "nope", filepath.Join(base, "new")}, exitFailed, "no volume"},
		{[]string{"volume", "backup", "ls", filepath.Join(base, "new")}, exitFailed, "no directory"}, // it was not made for nothing
		{[]string{"volume", "backup", "ls", "/nonexistent"}, exitFailed, "no directory"},
		{[]string{"volume", "backup", "ls", base}, exitFailed, "no backups in"},
		{[]string{"volume", "backup", "v", base}, exitFailed, "holds something else"},
		{[]string{"volume", "backup", "rm", repo, "v"}, exitUsage, "does not name a backup"},
		{[]string{"volume", "restore", repo, "v@nope", "x"}, exitFailed, "no backup v@nope"},
		{[]string{"volume", "restore", repo, "w", "x"}, exitFailed, "no backup of volume"},
		{[]string{"volume", "restore", repo, "v", "r"}, exitFailed, "exists already"},
		{[]string{"volume", "backup", "ls", "s3://"}, exitUsage, "does not name a bucket"},
	} {
		if r := n.cairn(c.args...); r.status != c.status || !strings.Contains(r.err, c.say) || strings.Contains(r.err, "\n") {
			t.Errorf("cairn %v: status %d, %q; want %d and %q", c.args, r.status, r.err, c.status, c.say)
		}
	}
}
