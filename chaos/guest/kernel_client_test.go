package guest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/cairnstore/cairn/chaos/cluster"
)

// The kernel's own NBD client, in a guest with a Debian kernel, on a volume of
// a real cluster: attached by netlink over several connections, under verified
// load, while the gateway is killed, and while the volume grows.
//
//	guest: ext4, xfs → /dev/nbd0 → TCP → QEMU's user network → forwarder → unix socket → cairn
const (
	kernelVolume  = 256 << 20
	kernelGateway = "host-1"
	kernelTimeout = 8 * time.Minute
)

// kernelRig is a guest beside a cluster.
type kernelRig struct {
	t    *testing.T
	ctx  context.Context
	c    *cluster.Cluster
	con  *Console
	size int64
}

func TestKernelClient(t *testing.T) {
	bin := os.Getenv("CAIRN_BIN")
	if bin == "" {
		t.Fatal("CAIRN_BIN names no cairn binary: run `make test-int`")
	}
	ctx, cancel := context.WithTimeout(context.Background(), kernelTimeout)
	t.Cleanup(cancel)
	c, err := cluster.Start(ctx, cluster.Config{Bin: bin, Hosts: 3})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	})
	r := &kernelRig{t: t, ctx: ctx, c: c, size: kernelVolume}
	if err := c.CreateVolume(ctx, "v", kernelVolume, 3); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Attach(ctx, "v", kernelGateway); err != nil {
		t.Fatal(err)
	}
	addr := forward(t, filepath.Join(c.Dir(), kernelGateway, "nbd.sock"))
	r.boot(bin)
	r.sh("ip link set lo up; ip link set eth0 up && ip addr add 10.0.2.15/24 dev eth0")
	_, port, err := net.SplitHostPort(addr)
	if err != nil {
		t.Fatal(err)
	}
	uri := "nbd://10.0.2.2:" + port + "/v"
	if dev := r.sh("cairn device attach --connections 4 " + uri); dev != "/dev/nbd0" {
		t.Fatalf("attached as %q", dev)
	}
	if got := r.sh("cairn device attach " + uri); got != "/dev/nbd0" { // asked twice
		t.Errorf("attached again as %q", got)
	}
	if out := r.sh("cairn device ls"); !strings.Contains(out, "/dev/nbd0") || !strings.Contains(out, uri) || !strings.Contains(out, "256 MiB") {
		t.Errorf("device ls: %s", out)
	}
	if n := strings.Fields(r.sh("cat /sys/block/nbd0/queue/write_cache /sys/block/nbd0/queue/fua /sys/block/nbd0/queue/discard_granularity")); len(n) < 3 || n[0] != "write" {
		t.Errorf("the kernel does not know what the export can do: %v", n)
	}
	r.files("ext4", "mkfs.ext4 -q /dev/nbd0", "resize2fs /dev/nbd0", "e2fsck -fn /dev/nbd0", 1)
	r.files("xfs", "mkfs.xfs -q -f /dev/nbd0", "xfs_growfs /mnt", "xfs_repair -n /dev/nbd0", 1)
	if out := r.sh("dmesg | grep -iE 'i/o error|blk_update|ext4-fs (error|warning)|xfs.*(error|corrupt|shutdown)|hung task' || true"); out != "" {
		t.Errorf("the guest saw: %s", out)
	}
	r.sh("cairn device detach /dev/nbd0")
	if out := r.sh("cairn device ls -o json"); out != "[]" {
		t.Errorf("after detaching: %s", out)
	}
	r.await("the keeper to end", "! ps | grep -q '[d]evice keep'")
	if out := r.sh("cat /run/cairn/nbd0.log"); !strings.Contains(out, "connections offered") || !strings.Contains(out, "device has grown") {
		t.Errorf("the keeper's log: %s", out)
	}
}

// files runs one file system through load, kills, growth and a check.
func (r *kernelRig) files(name, mkfs, grow, check string, kills int) {
	r.sh(mkfs + " && mount /dev/nbd0 /mnt")
	if out, err := r.con.Run(r.ctx, "cairn device detach /dev/nbd0"); err != nil || out.Status != 1 || !strings.Contains(out.Text, "in use") {
		r.t.Errorf("%s: detaching a mounted device: %+v, %v", name, out, err)
	}
	// Random files are written, made durable, dropped from the cache and
	// compared, for as long as the test wants.
	r.sh(`rm -f /tmp/stop /tmp/bad /tmp/ended; echo 0 > /tmp/n
cat > /tmp/load <<'E'
i=0
while [ ! -e /tmp/stop ]; do
  f=/mnt/f$((i % 5))
  dd if=/dev/urandom of=/tmp/data bs=64k count=16 2>/dev/null
  dd if=/tmp/data of=$f bs=64k conv=fsync 2>/tmp/err || { echo "write $i: $(cat /tmp/err)" >> /tmp/bad; }
  echo 1 > /proc/sys/vm/drop_caches
  cmp /tmp/data $f >> /tmp/bad 2>&1
  i=$((i + 1)); echo $i > /tmp/n
done
touch /tmp/ended
E
sh /tmp/load > /dev/null 2>&1 &`)
	done := r.count()
	for k := range kills {
		done = r.progress(done + 3)
		if err := r.c.Kill(kernelGateway); err != nil { // its supervisor starts it again
			r.t.Fatal(err)
		}
		killed := time.Now()
		done = r.progress(done + 2)
		r.t.Logf("%s: kill -9 %d of the gateway; two more files %v later", name, k+1, time.Since(killed).Round(10*time.Millisecond))
	}
	r.size += 64 << 20
	if _, err := r.c.Cairn(r.ctx, "volume", "resize", "v", "--size", strconv.FormatInt(r.size, 10)); err != nil {
		r.t.Fatal(err)
	}
	r.await("the device to grow", fmt.Sprintf("[ $(cat /sys/block/nbd0/size) = %d ]", r.size/512))
	r.sh(grow)
	if kb, err := strconv.ParseInt(r.sh("df -k /mnt | tail -n 1 | awk '{print $2}'"), 10, 64); err != nil || kb<<10 < r.size*8/10 {
		r.t.Errorf("%s: the file system has %d KiB of %d, %v", name, kb, r.size>>10, err)
	}
	r.progress(r.count() + 2)
	r.sh("touch /tmp/stop")
	r.await("the load to end", "[ -e /tmp/ended ]")
	if bad := r.sh("cat /tmp/bad"); bad != "" {
		r.t.Errorf("%s: %s", name, bad)
	}
	r.sh("fstrim /mnt && umount /mnt && " + check)
}

// boot starts the guest and logs in.
func (r *kernelRig) boot(bin string) {
	t := r.t
	t.Helper()
	img, err := Ensure(r.ctx, Config{Storage: true, Progress: func(s string) { t.Log(s) }})
	if err != nil {
		t.Fatal(err)
	}
	dir, err := os.MkdirTemp("", "guest")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	if img, err = img.With(r.ctx, dir, "cairn", bin); err != nil {
		t.Fatal(err)
	}
	console := filepath.Join(dir, "console")
	var said strings.Builder
	cmd := exec.Command("qemu-system-x86_64", "-machine", "q35", "-accel", "tcg", "-cpu", "max", "-smp", "2", "-m", "768",
		"-no-user-config", "-nodefaults", "-no-reboot", "-display", "none", "-kernel", img.Kernel, "-initrd", img.Initrd, "-append", img.Append,
		"-serial", "unix:"+console+",server=on,wait=off", "-netdev", "user,id=n", "-device", "virtio-net-pci,netdev=n,romfile=")
	cmd.Stderr = &said
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := cmd.Process.Kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
			t.Error(err)
		}
		var exit *exec.ExitError
		if err := cmd.Wait(); err != nil && !errors.As(err, &exit) {
			t.Error(err)
		}
		if t.Failed() && said.Len() > 0 {
			t.Logf("QEMU said: %s", said.String())
		}
	})
	booted := time.Now()
	r.con = dial(t, r.ctx, console)
	t.Cleanup(func() { closeConsole(t, r.con) })
	t.Logf("booted in %v", time.Since(booted).Round(100*time.Millisecond))
}

// sh runs a command in the guest that has to succeed.
func (r *kernelRig) sh(command string) string {
	r.t.Helper()
	out, err := r.con.Must(r.ctx, command)
	if err != nil {
		log, _ := r.con.Must(r.ctx, "tail -n 20 /run/cairn/nbd0.log; dmesg | tail -n 20; cat /tmp/bad")
		r.t.Fatalf("%v\n%s", err, log)
	}
	return out
}

// await polls a command in the guest until it succeeds.
func (r *kernelRig) await(what, command string) {
	r.t.Helper()
	if _, err := r.con.Must(r.ctx, "i=0; while ! { "+command+"; }; do i=$((i + 1)); [ $i -lt 600 ] || exit 1; sleep 0.1; done"); err != nil {
		log, _ := r.con.Must(r.ctx, "tail -n 20 /run/cairn/nbd0.log; dmesg | tail -n 20")
		r.t.Fatalf("waited in vain for %s: %v\n%s", what, err, log)
	}
}

// count is how many files the load has written and compared.
func (r *kernelRig) count() int {
	r.t.Helper()
	n, err := strconv.Atoi(r.sh("cat /tmp/n"))
	if err != nil {
		r.t.Fatal(err)
	}
	return n
}

// progress waits until the load has come to a number of files.
func (r *kernelRig) progress(to int) int {
	r.t.Helper()
	r.await(fmt.Sprintf("file %d", to), fmt.Sprintf("[ $(cat /tmp/n) -ge %d ]", to))
	return r.count()
}

// forward lets TCP clients on loopback reach a unix socket, until the test
// ends: a local cluster has no TCP export. When one side goes, the other does.
func forward(t *testing.T, socket string) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			in, err := l.Accept()
			if err != nil {
				return
			}
			wg.Go(func() { join(in, socket) })
		}
	})
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Error(err)
		}
		wg.Wait()
	})
	return l.Addr().String()
}

// join copies both ways until either side ends. Errors are the ends.
func join(in net.Conn, socket string) {
	out, err := net.Dial("unix", socket)
	if err != nil { // the server is away: so is this connection
		_ = in.Close()
		return
	}
	var wg sync.WaitGroup
	for _, p := range [][2]net.Conn{{in, out}, {out, in}} {
		wg.Go(func() {
			_, _ = io.Copy(p[0], p[1])
			_ = in.Close()
			_ = out.Close()
		})
	}
	wg.Wait()
}
