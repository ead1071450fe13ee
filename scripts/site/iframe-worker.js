// Pages opened as files may not start workers: the script of the search runs in a hidden frame instead.
if (location.protocol === "file:") {
  window.Worker = class {
    constructor(url) {
      this.waiting = [] // messages for a script that is not loaded yet
      this.frame = document.createElement("iframe")
      this.frame.hidden = true
      document.body.append(this.frame)
      const inside = this.frame.contentWindow
      inside.postMessage = message => this.deliver(this, structuredClone(message))
      const script = inside.document.createElement("script")
      script.src = new URL(url, document.baseURI)
      script.onload = () => {
        const waiting = this.waiting
        this.waiting = null
        waiting.forEach(message => this.deliver(inside, message))
      }
      script.onerror = () => this.onerror?.(new Event("error"))
      inside.document.body.append(script)
    }

    deliver(target, data) {
      setTimeout(() => target.onmessage?.(new MessageEvent("message", { data })))
    }

    postMessage(message) {
      const copy = this.frame.contentWindow.structuredClone(message)
      if (this.waiting) this.waiting.push(copy)
      else this.deliver(this.frame.contentWindow, copy)
    }

    terminate() {
      this.frame.remove()
    }
  }
}
